"""Data: files of rows -> conversations -> tokens and labels -> packed rows -> the batches of a step.

Only the loader needs torch. It is imported when it is asked for, so that the processes that tokenise start without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .cache import default_cache
from .conversation import Conversation, Message
from .dataset import DataSettings, Rendering, load_dataset, load_split
from .fields import FieldNames
from .formats import to_conversation, to_question
from .packing import PackedRows, build_rows, pack
from .readers import read_rows
from .template import ChatTemplate, Sample
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from .loader import Loader, Step, steps_ahead

__all__ = [
    "ChatTemplate",
    "Conversation",
    "DataSettings",
    "FieldNames",
    "Loader",
    "Message",
    "PackedRows",
    "Rendering",
    "Sample",
    "Step",
    "build_rows",
    "default_cache",
    "load_dataset",
    "load_split",
    "load_tokenizer",
    "pack",
    "read_rows",
    "steps_ahead",
    "to_conversation",
    "to_question",
]


def __getattr__(name: str) -> Any:
    if name not in ("Loader", "Step", "steps_ahead"):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from . import loader

    return getattr(loader, name)
