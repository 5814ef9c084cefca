"""What an encoder-decoder is asked: sources from the command line or a file, to token ids. On rank 0 alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megalora.data import Conversation, Message, read_rows
from megalora.data.packing import Sides
from megalora.data.pairs import PairRows, read_pair
from megalora.data.tokenizer import OpenedTokenizer
from megalora.errors import UserError
from megalora.flags import GenerationArguments
from megalora.generation.defaults import beginning, eos_token_ids
from megalora.generation.prompts import ROWS, Question, ask, read_questions
from megalora.models.spec import ModelSpec

# Flags of chat templates and contexts, and of the logits of prompts.
_NO_EFFECT = {
    "system", "template", "chat_template_kwargs", "special_tokens_in_text", "show_thinking", "seq_length",
    "return_logits",
}  # fmt: skip


def check_flags(options: GenerationArguments, config: ModelSpec) -> None:
    """Raise UserError for flags that mean nothing to an encoder-decoder, and where no source is given."""
    for one in fields(options):
        if one.name in _NO_EFFECT and getattr(options, one.name) != one.default:
            raise UserError(f"{one.name} has no effect: {config.model_type} is an encoder-decoder", "leave it out")
    if options.chats:
        what = f"{config.model_type} is an encoder-decoder, which does not chat"
        raise UserError(what, "give prompt or prompts_file")


def source_rows(opened: OpenedTokenizer, options: GenerationArguments, recorded: str | None) -> PairRows:
    """Return how sources become tokens. recorded: the prefix that the adapter was trained with."""
    prefix = recorded if options.source_prefix is None else options.source_prefix
    return PairRows(opened, Sides(0, 0), prefix or "")


def questions(options: GenerationArguments) -> list[Question]:
    """Return the sources that are asked for. Raises UserError as `read_questions`."""
    if options.prompt is not None:
        return [ask(options.prompt, None, "prompt")]
    path = Path(options.prompts_file or "")
    if path.suffix.lower() not in ROWS:
        return read_questions(path, None)
    found = []
    for number, row in enumerate(read_rows(path)):
        where = f"{path} row {number}"
        found.append(Question(Conversation((Message("user", read_pair(row, where, question=True).source),)), where))
    return found


def encode(rows: PairRows, asked: Sequence[Question], config: ModelSpec) -> list[list[int]]:
    """Return the tokens of each source. Raises UserError for one that is longer than the model is made for."""
    longest, found = config.max_position_embeddings, []
    for question in asked:
        ids = rows.source(question.text)
        if len(ids) > longest:
            what = f"{question.where}: {len(ids)} tokens are more than the {longest} of the model"
            raise UserError(what, "shorten it")
        found.append(ids)
    return found


def stops(folder: str | Path, rows: PairRows) -> tuple[int, ...]:
    """Return where a reply ends: the eos of generation_config.json, else of config.json, else of the tokenizer."""
    found = eos_token_ids(folder) or [rows.tokenizer.eos_token_id]
    return tuple(sorted({token for token in found if token is not None}))


def first_tokens(folder: str | Path, config: ModelSpec) -> tuple[int, ...]:
    """Return what the decoder begins with: its start token, and the one that it is made to write first."""
    assert config.encoder is not None
    return beginning(folder, config.encoder.start, config.encoder.forced, config.vocab_size)
