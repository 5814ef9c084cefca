"""Flags of the data -> how rows are read, rendered and encoded: the same for a run and for a preview of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megalora.added_tokens import AddedToken
from megalora.choices import CLASSIFICATION
from megalora.data import ChatTemplate, DataSettings, FieldNames, Rendering, default_cache
from megalora.data.classes import ClassRows, choose_labels
from megalora.data.images import ImageRows, read_processing
from megalora.data.packing import Sides
from megalora.data.pairs import PairRows
from megalora.data.pixels import PixelReader
from megalora.data.template import TemplateOptions
from megalora.data.tokenizer import OpenedTokenizer, open_tokenizer
from megalora.errors import UserError
from megalora.flags import DataArguments
from megalora.models.spec import ModelSpec
from megalora.parallel.collectives import on_first, together
from megalora.parallel.mesh import Axis

if TYPE_CHECKING:
    from megalora.data.conversation import TrainOn
    from megalora.data.dataset import OnBadRow
    from megalora.data.encode import OnLongRow
    from megalora.data.template import HistoryThinking

# Flags of the chat template, with what they are where they are not given.
_OF_TEMPLATES = {
    "template": None,
    "chat_template_kwargs": None,
    "history_thinking": "split",
    "special_tokens_in_text": False,
}


def template_options(data: DataArguments) -> TemplateOptions:
    """Return how the chat template is used."""
    history = cast("HistoryThinking", data.history_thinking)
    return TemplateOptions(data.template_variables, history, data.special_tokens_in_text)


def rendering(
    task: str,
    config: ModelSpec,
    model_path: str,
    data: DataArguments,
    labels: tuple[str, ...],
    world: Axis,
    added: Sequence[AddedToken] = (),
) -> Rendering:
    """Return how the rows of a task become documents. Collective over `world`.

    labels  those of the adapter that the run starts from, where it is a classifier's
    added   tokens that the tokenizer gets beyond those of the model's folder
    Raises UserError, on every rank, for labels that cannot be used, and flags that mean nothing for the task.
    """
    with together(world):
        if config.encoder is not None and added:
            what = f"new_special_tokens is not implemented for {config.model_type}, which has an encoder"
            raise UserError(what, "add the tokens to model and tokenizer with transformers first")
        opened = open_tokenizer(model_path, added)
        if config.encoder is None:
            refuse_of_sources(config, source_length=data.source_length, source_prefix=data.source_prefix)
            if task not in CLASSIFICATION:
                template = data.template or image_template(config, opened)
                return with_images(ChatTemplate.of(opened, template, template_options(data)), config, model_path)
        for name, unset in _OF_TEMPLATES.items():
            if getattr(data, name) != unset:
                raise UserError(f"{name} has no effect for task_type {task}: it has no chat template", "leave it out")
        if config.encoder is not None:
            sides = Sides(data.source_tokens, config.encoder.start)
            return with_images(PairRows(opened, sides, data.source_prefix or ""), config, model_path)
    names = FieldNames(data.renamed_columns, frozenset(data.ignore_columns or ()))
    labels = labels or on_first(lambda: choose_labels(task, model_path, data.data_path, names, config.columns), world)
    return ClassRows(opened, task, labels, last=config.causal, columns=config.columns)


def with_images(
    rows: ChatTemplate | PairRows, config: ModelSpec, model_path: str
) -> ChatTemplate | PairRows | ImageRows:
    """Return how rows are read behind images, where the model has those before its texts; else `rows`."""
    if config.prefix is None:
        return rows
    processing = read_processing(model_path)
    PixelReader(processing, config.prefix.vision.image_size, model_path)  # which refuses what it cannot read
    return ImageRows(rows, config.prefix.tokens, config.prefix.placeholder, processing)


def image_template(config: ModelSpec, opened: OpenedTokenizer) -> str | None:
    """Return the built-in template for texts behind images, where neither model nor adapter has one of their own."""
    return "bare" if config.prefix is not None and not opened.tokenizer.chat_template else None


def pixel_reader(config: ModelSpec, model_path: str) -> PixelReader | None:
    """Return what reads the pixels of images; None where the model reads none. Raises UserError."""
    if config.prefix is None:
        return None
    return PixelReader(read_processing(model_path), config.prefix.vision.image_size, model_path)


def refuse_of_sources(config: ModelSpec, **given: object) -> None:
    """Raise UserError for flags of sources, which a model without an encoder does not read."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name} has no effect: {config.model_type} has no encoder", "leave it out")


def data_settings(data: DataArguments) -> DataSettings:
    """Return how rows become documents, and where their tokens are kept."""
    return DataSettings(
        data.seq_length,
        packing=data.packing,
        on_bad_row=cast("OnBadRow", data.on_bad_row),
        on_long_row=cast("OnLongRow", data.on_long_row),
        train_on=cast("TrainOn", data.train_on),
        names=FieldNames(data.renamed_columns, frozenset(data.ignore_columns or ())),
        max_rows=data.max_rows,
        data_cache=Path(data.data_cache) if data.data_cache else default_cache(),
    )
