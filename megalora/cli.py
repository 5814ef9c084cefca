"""`megalora finetune|generate|data|convert|plan|doctor FLAGS`: arguments in, exit status out.

The scripts in tools/ are this with the command filled in. Torch is only imported once the arguments are
sound, so that `--help` and errors come at once.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from megalora import __version__
from megalora.arguments import (
    convert_command,
    help_text,
    parse_convert,
    parse_doctor,
    parse_finetune,
    parse_generate,
    parse_plan,
    parse_preview,
    validate_world,
)
from megalora.errors import Leaving, Preempted, UserError

USER_ERROR, BUG, INTERRUPTED, FAULTS = 2, 1, 130, 4
"""Exit statuses; 0 is success."""

_GRACE_SECONDS = 3.0

_USAGE = f"""\
megalora {__version__}: LoRA fine-tuning with tensor, pipeline and data parallelism

usage: megalora COMMAND [RUN.yaml] --FLAG VALUE ...
       torchrun --nproc_per_node N -m megalora COMMAND ...    on N processes

  finetune   train an adapter
  generate   reply to prompts, with or without an adapter
  data       rows as a run would see them: what is trained, counts, lengths
  convert    weights and adapters between Hugging Face, PEFT and shards
  plan       memory, time and the best layout of a run, before it runs
  doctor     what would stop or slow a run on these hosts
  COMMAND --help lists the flags; --version prints the version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: that of the process) and gives the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run(lambda: _command(words))


def run(command: Callable[[], int | None]) -> int:
    """Calls `command`, which may give an exit status, and gives that of this process.

    UserError: rank 0 prints its line, every rank gives 2. Preempted: 75. RankLost, of which the watch has told: 3.
    Ctrl-C: 130. Anything else is our bug: the traceback, each line marked with the rank, and 1, at which torchrun
    ends the other ranks.
    """
    rank = _rank()
    try:
        return command() or 0
    except UserError as error:
        if rank != 0:
            # torchrun ends all ranks when the first one leaves: rank 0 goes first, it has the line to print.
            time.sleep(_GRACE_SECONDS)
            return USER_ERROR
        print(f"megalora: error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except Preempted as left:
        from megalora.cluster.preemption import exit_status

        if rank == 0:
            print(f"megalora: {left}", file=sys.stderr, flush=True)
        return exit_status()
    except Leaving as left:
        return left.status
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        lines = traceback.format_exc().splitlines()
        print("\n".join(f"[rank {rank}] {line}" for line in lines), file=sys.stderr, flush=True)
        return BUG


def _command(words: list[str]) -> int:
    if words[:1] in (["--version"], ["-V"]):
        _say(f"megalora {__version__}")
    elif not words or words[0] in ("--help", "-h"):
        _say(_USAGE)
    elif words[0] not in ("finetune", "generate", "data", "convert", "plan", "doctor"):
        commands = "finetune, generate, data, convert, plan or doctor"
        raise UserError(f"unknown command {words[0]}: give {commands} (megalora --help)")
    elif words[0] == "convert":
        _convert(words[1:])
    elif "--help" in words or "-h" in words:
        _say(help_text(words[0]))
    elif words[0] == "finetune":
        _finetune(words[1:])
    elif words[0] == "data":
        _data(words[1:])
    elif words[0] == "plan":
        _plan(words[1:])
    elif words[0] == "doctor":
        return _doctor(words[1:])
    else:
        _generate(words[1:])
    return 0


def _finetune(argv: Sequence[str]) -> None:
    arguments = parse_finetune(argv)
    validate_world(arguments.parallel, _world_size())
    from megalora.finetune import finetune

    finetune(arguments)


def _generate(argv: Sequence[str]) -> None:
    arguments = parse_generate(argv)
    validate_world(arguments.parallel, _world_size())
    if arguments.not_applied:
        # On standard error: standard output is for the replies.
        _say(f"megalora: not applied in generation: {', '.join(arguments.not_applied)}", sys.stderr)
    from megalora.generate import generate

    generate(arguments)


def _data(argv: Sequence[str]) -> None:
    arguments = parse_preview(argv)
    if _world_size() > 1:
        raise UserError(f"data runs in one process, and here are {_world_size()}: start it without torchrun")
    from megalora.preview import preview

    preview(arguments)


def _doctor(argv: Sequence[str]) -> int:
    arguments = parse_doctor(argv)
    from megalora.doctor import doctor

    return 0 if doctor(arguments) else FAULTS


def _convert(argv: Sequence[str]) -> None:
    if "--help" in argv or "-h" in argv:
        _say(help_text("convert" if argv[0] in ("--help", "-h") else f"convert {convert_command(argv)}"))
        return
    arguments = parse_convert(argv)
    if _world_size() > 1:
        raise UserError(f"convert runs in one process, and here are {_world_size()}: start it without torchrun")
    from megalora.convert import convert

    convert(arguments)


def _plan(argv: Sequence[str]) -> None:
    arguments = parse_plan(argv)
    if _world_size() > 1:
        raise UserError(f"plan runs in one process, and here are {_world_size()}: start it without torchrun")
    from megalora.plan import plan

    plan(arguments)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _say(text: str, file: object = None) -> None:
    if _rank() == 0:
        print(text, file=file or sys.stdout, flush=True)
