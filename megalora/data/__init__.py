"""Data: a file of rows -> messages -> tokens and labels -> packed rows -> the batches of a step."""

from .dataset import load_dataset
from .formats import read_rows, to_messages, to_question
from .loader import Loader, Step, steps_ahead
from .packing import PackedRows, build_rows, pack
from .template import ChatTemplate, Sample, load_tokenizer

__all__ = [
    "ChatTemplate",
    "Loader",
    "PackedRows",
    "Sample",
    "Step",
    "build_rows",
    "load_dataset",
    "load_tokenizer",
    "pack",
    "read_rows",
    "steps_ahead",
    "to_messages",
    "to_question",
]
