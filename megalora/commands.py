"""The commands: sound arguments in, results out. Torch is imported only once the arguments are sound."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megalora import flags
from megalora.cluster.environment import NPROC, check_launcher, environment_int
from megalora.errors import UserError
from megalora.flags.flag import flags_of
from megalora.model_paths import check_holds_base, check_writes_apart, model_folder
from megalora.web.server import require_web

if TYPE_CHECKING:
    from megalora.finetune import FinetuneResult
    from megalora.planning.plans import Plan


_OF_WEIGHTS = ("model_path", "resume_from_checkpoint")


def finetune(arguments: flags.FinetuneArguments) -> FinetuneResult:
    """Train an adapter, and return its last metrics and the paths of what was written."""
    _check_started(arguments.parallel)
    arguments = check_finetune(arguments, environment_int("WORLD_SIZE", 1))
    if sys.stdout.isatty():
        _tell("importing torch", sys.stdout)  # some seconds, or minutes from a cold disk
    from megalora.finetune import finetune

    return finetune(arguments)


def _tell(line: str, file: TextIO) -> None:
    if environment_int("RANK", 0) == 0:
        print(line, file=file, flush=True)


def check_finetune(arguments: flags.FinetuneArguments, processes: int) -> flags.FinetuneArguments:
    """Return the arguments with the folder of the model, where model_path names one of the hub.

    Raises UserError for what can be known to be wrong on `processes` processes without torch.
    """
    flags.validate_world(arguments.parallel, processes)
    arguments = replace(arguments, model=_with_folder(arguments.model))
    model, train = arguments.model, arguments.train
    bases = model.model_path, model.resume_from_checkpoint
    for flag, folder in (("output_dir", train.output_dir), ("log_dir", train.log_dir)):
        check_writes_apart(flag, folder, bases)
    if not arguments.train.overwrite_output_dir:
        # A run that overwrites first notes so in output_dir: started again by torchrun, it would otherwise take the
        # older run there for its own.
        _check_paths(arguments.model, arguments.data, arguments.train)
    _check_trackers(arguments.train.report_to or ())
    return arguments


def _check_trackers(names: Sequence[str]) -> None:
    """Raise UserError where a package that metrics are to go to is not installed. On several hosts rank 0 finds out."""
    if environment_int("LOCAL_WORLD_SIZE", 1) != environment_int("WORLD_SIZE", 1):
        return
    for name in names:
        if name != "none" and importlib.util.find_spec(name) is None:
            raise UserError(
                f"report_to {name}: the package {name} is not installed",
                f"pip install {name}, or leave it out of report_to",
            )


def generate(arguments: flags.GenerateArguments) -> None:
    """Write replies to standard output or to a file, or chat in the terminal."""
    _check_started(arguments.parallel)
    arguments = check_generate(arguments, environment_int("WORLD_SIZE", 1))
    from megalora.generate import generate

    generate(arguments)
    adapter = arguments.model.resume_peft_from_checkpoint
    if adapter is not None and arguments.generation.prompt is not None and sys.stderr.isatty():
        words = ["megalora", "serve", "--model_path", arguments.model.model_path, "--adapters", f"tuned={adapter}"]
        _tell(f"megalora: to talk to it on a page: {shlex.join(words)}", sys.stderr)


def check_generate(arguments: flags.GenerateArguments, processes: int) -> flags.GenerateArguments:
    """Check as `check_finetune`, for a generation."""
    flags.validate_world(arguments.parallel, processes)
    arguments = replace(arguments, model=_with_folder(arguments.model))
    _check_paths(arguments.model, arguments.generation)
    bases, options = (arguments.model.model_path, arguments.model.resume_from_checkpoint), arguments.generation
    check_writes_apart("output_file", options.output_file, bases, file=True)
    check_writes_apart("logits_dir", options.logits_dir if options.return_logits else None, bases)
    return arguments


def replies(arguments: flags.GenerateArguments) -> list[dict[str, Any]]:
    """Generate, and return the rows of the output file, which need not be named. On other ranks than 0: none."""
    options = arguments.generation
    if options.chats:
        raise UserError(
            "prompt or prompts_file must be given: a chat needs a terminal", "give one, or run megalora generate"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(options.output_file or Path(folder) / "replies.jsonl")
        generate(replace(arguments, generation=replace(options, output_file=str(file))))
        if environment_int("RANK", 0) != 0:
            return []
        with file.open(encoding="utf-8") as lines:  # not splitlines: a reply may hold other separators of lines
            return [json.loads(line) for line in lines]


def check_serve(arguments: flags.Serving, processes: int) -> flags.Serving:
    """Check as `check_finetune`, for a server."""
    layout = arguments.layout
    needed = layout.tensor_parallel_size * layout.pipeline_parallel_size
    if processes != needed:
        raise UserError(
            f"megalora serve runs one copy of the model: tensor_parallel_size * pipeline_parallel_size = {needed}, but "
            f"there are {processes} processes",
            f"start {needed}, or another server on another port for each further copy",
        )
    arguments = replace(arguments, served=_with_folder(arguments.served))
    _check_paths(arguments.served)
    require_web()
    return arguments


def serve(arguments: flags.Serving) -> None:
    """Serve a model and its adapters over HTTP, until a signal asks to stop."""
    check_launcher()
    arguments = check_serve(arguments, environment_int("WORLD_SIZE", 1))
    from megalora.serve import serve

    serve(arguments)


def board(arguments: flags.BoardArguments) -> None:
    """Serve a page that shows runs, until a signal asks to stop."""
    _one_process("board")
    require_web()
    from megalora.board import board

    board(arguments)


def report(arguments: flags.ReportArguments) -> Path:
    """Write a page that shows runs into one file, and return it."""
    _one_process("report")
    from megalora.report import report

    return report(arguments)


def data(arguments: flags.Preview) -> None:
    """Print rows as a run would see them, with counts and lengths."""
    _one_process("data")
    arguments = replace(arguments, shown=_with_folder(arguments.shown))
    _check_paths(arguments.shown)
    from megalora.preview import preview

    preview(arguments)


def plan(arguments: flags.PlanArguments) -> list[Plan]:
    """Print the ranked table of layouts, and return them, best first."""
    _one_process("plan")
    _check_paths(arguments)
    path = Path(arguments.model_path)
    check_writes_apart("draw", arguments.draw, [str(path), str(path.parent)], file=True)
    from megalora.plan import plan

    return plan(arguments)


def convert(arguments: flags.Conversion) -> Path:
    """Convert weights or an adapter, and return the output folder (with dry_run: that would be written)."""
    _one_process("convert")
    for paths in (arguments.paths, arguments.compared, arguments.started, arguments.plain):
        if paths is not None:
            _check_paths(paths)
    from megalora.convert import convert
    from megalora.recombine import RECOMBINE

    RECOMBINE.get(arguments.command, convert)(arguments)
    return Path(arguments.compared.adapter if arguments.paths is None else arguments.paths.output)


def doctor(arguments: flags.DoctorArguments) -> bool:
    """Check the hosts of a run; return whether they are sound."""
    from megalora.doctor import doctor

    return doctor(arguments)


def _check_started(parallel: flags.ParallelArguments) -> None:
    """Raise UserError where this is not one of the processes that its launcher or nproc say it is."""
    check_launcher()
    if parallel.nproc is not None and environment_int(NPROC, 0) != parallel.nproc:
        raise UserError(
            f"nproc {parallel.nproc} belongs to the command line, which starts the processes",
            "leave it out, and start this script with torchrun",
        )


def _one_process(command: str) -> None:
    processes = environment_int("WORLD_SIZE", 1)
    if processes > 1:
        raise UserError(
            f"megalora {command} runs in one process, but {processes} were started", "start it without torchrun"
        )


def _check_paths(*sections: Any) -> None:
    """Raise UserError where a path that must exist does not, before the seconds that importing torch takes.

    Not on several hosts, of which one alone may lack it: the ranks find out together later.
    """
    if environment_int("LOCAL_WORLD_SIZE", 1) != environment_int("WORLD_SIZE", 1):
        return
    for section in sections:
        kind: type = type(section)
        for flag in flags_of(kind):
            value = getattr(section, flag.name)
            flag.check_exists(value)
            if flag.name in _OF_WEIGHTS and hasattr(section, "resume_from_checkpoint") and value is not None:
                check_holds_base(value, flag.name)


def _with_folder(section: Any) -> Any:
    """Return a section whose model_path is a folder of this machine, where it can be."""
    return replace(section, model_path=model_folder(section.model_path))
