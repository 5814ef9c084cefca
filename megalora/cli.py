"""`megalora COMMAND FLAGS`: words of a command line in, exit status out.

The scripts in tools/ are this with the command filled in. Neither the flags nor torch are imported before they are
needed, so that `--help` and errors come at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from megalora import __version__
from megalora.errors import Leaving, Preempted, UserError

USER_ERROR, BUG, INTERRUPTED, FAULTS = 2, 1, 130, 4
"""Exit statuses; 0 is success."""

if TYPE_CHECKING:
    from megalora.flags import ParallelArguments
    from megalora.flags.web import ServedArguments

_GRACE_SECONDS = 3.0

_USAGE = f"""\
megalora {__version__}: LoRA fine-tuning with tensor, pipeline and data parallelism

usage: megalora COMMAND [RUN.yaml | recipe:NAME] --FLAG VALUE ...
       megalora COMMAND --nproc N ...    on N processes of this host; on several hosts: torchrun -m megalora COMMAND ...

  finetune   train an adapter
  generate   reply to prompts, with or without an adapter
  serve      serve the base and its adapters to OpenAI clients, with a chat page
  board      show runs in the browser, live
  report     write a run's curves and settings into one HTML file
  data       show rows as a run would see them: what is trained on, counts, lengths
  convert    convert weights and adapters between Hugging Face, PEFT, GGUF and megalora shards
  plan       estimate memory and time of a run, and find its best layout
  recipes    list recipes: flags for usual runs, to start from
  doctor     find problems of these hosts that would stop or slow down a run

  COMMAND --help lists the flags; --version prints the version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process) and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run(lambda: _command(words))


def run(command: Callable[[], int | None]) -> int:
    """Call `command`, which may return an exit status, and return that of this process.

    UserError: rank 0 prints it, every rank returns 2. Preempted: 75. RankLost, which the watch has reported: 3.
    Ctrl-C: 130. Anything else is our bug: the traceback, each line marked with the rank, and 1, at which torchrun
    ends the other ranks.
    """
    rank = _rank()
    try:
        return command() or 0
    except UserError as error:
        if rank != 0:
            # torchrun ends all ranks when the first one leaves: rank 0 goes first, it has the error to print.
            time.sleep(_GRACE_SECONDS)
            return USER_ERROR
        _say(_told(error), sys.stderr)
        return USER_ERROR
    except Preempted as left:
        from megalora.cluster.preemption import exit_status

        _say(f"megalora: {left}", sys.stderr)
        return exit_status(left)
    except Leaving as left:
        return left.status
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        lines = traceback.format_exc().splitlines()
        print("\n".join(f"[rank {rank}] {line}" for line in lines), file=sys.stderr, flush=True)
        return BUG


def _told(error: UserError) -> str:
    """Return the lines that an error is printed as."""
    return f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else "")


def _command(words: list[str]) -> int:
    name, *rest = words or ["--help"]
    if name in ("--version", "-V"):
        _say(f"megalora {__version__}")
    elif name in ("--help", "-h"):
        _say(_USAGE)
    elif name not in _COMMANDS:
        raise UserError(f"unknown command {name}", f"give {_listed([*_COMMANDS])}; megalora --help explains them")
    else:
        return _COMMANDS[name](rest)
    return 0


def _finetune(argv: list[str]) -> int:
    if _asks_for_help(argv):
        return _help("finetune")
    from megalora import commands, flags

    arguments = flags.parse_finetune(argv)
    if _starts_processes(arguments.parallel):
        commands.check_finetune(arguments, arguments.parallel.nproc)
        return _run_here(arguments.parallel.nproc, ["finetune", *argv])
    commands.finetune(arguments)
    return 0


def _generate(argv: list[str]) -> int:
    if _asks_for_help(argv):
        return _help("generate")
    from megalora import commands, flags

    arguments = flags.parse_generate(argv)
    if _starts_processes(arguments.parallel):
        commands.check_generate(arguments, arguments.parallel.nproc)
        return _run_here(arguments.parallel.nproc, ["generate", *argv], interactive=arguments.generation.chats)
    if arguments.not_applied:
        # On standard error: standard output is for the replies.
        _say(f"megalora: not applied in generation: {', '.join(arguments.not_applied)}", sys.stderr)
    commands.generate(arguments)
    return 0


def _starts_processes(parallel: ParallelArguments | ServedArguments) -> bool:
    """Return whether this process is to start those of `nproc`, and is none of them."""
    from megalora.cluster.environment import NPROC

    return parallel.nproc is not None and os.environ.get(NPROC) != str(parallel.nproc)


def _run_here(processes: int, words: list[str], interactive: bool = False) -> int:
    from megalora.cluster.local import run_here

    return run_here(processes, words, interactive=interactive)


def _serve(argv: list[str]) -> int:
    if _asks_for_help(argv):
        return _help("serve")
    from megalora import commands, flags

    arguments = flags.parse_serve(argv)
    if _starts_processes(arguments.served):
        commands.check_serve(arguments, arguments.served.nproc)
        return _run_here(arguments.served.nproc, ["serve", *argv])
    commands.serve(arguments)
    return 0


def _board(argv: list[str]) -> int:
    if _asks_for_help(argv):
        return _help("board")
    from megalora import commands, flags

    commands.board(flags.parse_board(argv))
    return 0


def _report(argv: list[str]) -> int:
    if _asks_for_help(argv):
        return _help("report")
    from megalora import commands, flags

    _say(f"megalora: wrote {commands.report(flags.parse_report(argv))}")
    return 0


def _data(argv: list[str]) -> int:
    if _asks_for_help(argv):
        return _help("data")
    from megalora import commands, flags

    commands.data(flags.parse_preview(argv))
    return 0


def _convert(argv: list[str]) -> int:
    from megalora import commands, flags

    if argv[:1] in (["--help"], ["-h"]):
        return _help("convert")
    command, argv = flags.split_convert(argv)
    if _asks_for_help(argv):
        return _help(f"convert {command}")
    commands.convert(flags.parse_convert(command, argv))
    return 0


def _plan(argv: list[str]) -> int:
    if _asks_for_help(argv):
        return _help("plan")
    from megalora import commands, flags

    commands.plan(flags.parse_plan(argv))
    return 0


def _recipes(argv: list[str]) -> int:
    from megalora.recipes import listing

    if argv and not _asks_for_help(argv):
        raise UserError(f"megalora recipes takes no flags ({argv[0]})", "run megalora recipes")
    _say(listing())
    return 0


def _doctor(argv: list[str]) -> int:
    if _asks_for_help(argv):
        return _help("doctor")
    from megalora import commands, flags

    return 0 if commands.doctor(flags.parse_doctor(argv)) else FAULTS


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "finetune": _finetune,
    "generate": _generate,
    "serve": _serve,
    "board": _board,
    "report": _report,
    "data": _data,
    "convert": _convert,
    "plan": _plan,
    "recipes": _recipes,
    "doctor": _doctor,
}


def _asks_for_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def _help(command: str) -> int:
    from megalora.flags.help import help_text

    _say(help_text(command))
    return 0


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _rank() -> int:
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0  # whoever reads it to start a process group reports what is wrong


def _say(text: str, file: TextIO | None = None) -> None:
    """Print on rank 0. That nobody reads on (`--help | head`, a run's `| tee` after Ctrl-C) is no error."""
    if _rank() != 0:
        return
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        # What is left in the buffer would fail again when Python flushes it at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
