"""Flags of the data -> how rows are read, rendered and encoded: the same for a run and for a preview of its rows."""

from __future__ import annotations

from pathlib import Path

from megalora.data import DataSettings, FieldNames, default_cache
from megalora.data.template import TemplateOptions
from megalora.flags import DataArguments


def template_options(data: DataArguments) -> TemplateOptions:
    """Return how the chat template is used."""
    return TemplateOptions(data.template_variables, data.history_thinking, data.special_tokens_in_text)


def data_settings(data: DataArguments) -> DataSettings:
    """Return how rows become documents, and where their tokens are kept."""
    return DataSettings(
        data.seq_length,
        packing=data.packing,
        on_bad_row=data.on_bad_row,
        on_long_row=data.on_long_row,
        train_on=data.train_on,
        names=FieldNames(data.renamed_columns, frozenset(data.ignore_columns or ())),
        max_rows=data.max_rows,
        data_cache=Path(data.data_cache) if data.data_cache else default_cache(),
    )
