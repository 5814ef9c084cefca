"""megalora: LoRA fine-tuning with tensor, pipeline and data parallelism, the same numbers on every layout.

    import megalora

    result = megalora.finetune(model_path="model", data_path="rows.json", output_dir="out")
    replies = megalora.generate(model_path="model", resume_peft_from_checkpoint="out", prompt="Who are you?")

The functions take the flags of the commands by the same names (docs/flags.md), and the same checks hold: a wrong,
missing, unknown or idle one raises UserError. Importing megalora imports nothing heavy.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalora.errors import UserError

if TYPE_CHECKING:
    from megalora.finetune import FinetuneResult
    from megalora.planning.plans import Plan

__version__ = "0.1.0"

__all__ = ["UserError", "__version__", "convert", "finetune", "generate", "plan"]


def finetune(**flags: Any) -> FinetuneResult:
    """Train an adapter as `megalora finetune` does, and return its result: metrics and paths of what was written.

    flags  those of `megalora finetune`, by name; `config` may name a YAML file of more
    Raises UserError for what the user can fix, Preempted where a signal ended the run early. Under torchrun, call it on
    every rank.
    """
    from megalora import commands
    from megalora.flags import parse_finetune

    return commands.finetune(parse_finetune(flags))


def generate(**flags: Any) -> list[dict[str, Any]]:
    """Reply to `prompt` or to each prompt of `prompts_file`, and return one dict per prompt.

    flags  those of `megalora generate`, by name
    Each dict has "prompt" (and "image" where one stands before it), "response" and "finish_reason"; with show_thinking
    also "thinking", with compare_base those of the base model as "base_response" and so on. They are written to
    output_file too where that is given. Under torchrun, call it on every rank; rank 0 gets the replies, the others an
    empty list. Raises UserError.
    """
    import warnings

    from megalora import commands
    from megalora.flags import parse_generate

    arguments = parse_generate(flags)
    if arguments.not_applied:
        warnings.warn(f"not applied in generation: {', '.join(arguments.not_applied)}", stacklevel=2)
    return commands.replies(arguments)


def plan(**flags: Any) -> list[Plan]:
    """Estimate the layouts of a run as `megalora plan` does, print them, and return those that fit, fastest first.

    flags  those of `megalora plan`, by name
    Raises UserError, also where no layout fits.
    """
    from megalora import commands
    from megalora.flags import parse_plan

    return commands.plan(parse_plan(flags))


def convert(command: str, **flags: Any) -> Path:
    """Convert weights or an adapter as `megalora convert COMMAND` does, and return the output folder.

    command  such as "to-hf" or "adapter merge"
    flags    those of the command, by name
    Raises UserError.
    """
    from megalora import commands
    from megalora.flags import parse_convert

    return commands.convert(parse_convert(command, flags))


class _Package(types.ModuleType):
    """This package. Importing the module megalora.finetune does not hide the function megalora.finetune."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and isinstance(value, types.ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
