"""Data: a file of rows -> messages -> tokens and labels -> packed rows -> the batches of a step."""

from .cache import default_cache
from .conversation import Conversation, Message
from .dataset import DataSettings, load_dataset, load_split
from .fields import FieldNames
from .formats import to_conversation, to_question
from .loader import Loader, Step, steps_ahead
from .packing import PackedRows, build_rows, pack
from .readers import read_rows
from .template import ChatTemplate, Sample
from .tokenizer import load_tokenizer

__all__ = [
    "ChatTemplate",
    "Conversation",
    "DataSettings",
    "FieldNames",
    "Loader",
    "Message",
    "PackedRows",
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
