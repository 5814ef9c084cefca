"""What is asked, as text: from the command line or a file to messages, and on to token ids.

All of this runs on rank 0 alone; the other ranks are sent token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalora.data import ChatTemplate, Conversation, Message, read_rows, to_question
from megalora.errors import UserError
from megalora.files import read_text
from megalora.generation.defaults import eos_token_ids

ROWS = (".json", ".jsonl")


@dataclass(frozen=True)
class Question:
    """A conversation whose last message is the user's. where: its name in an error; image: the file of one before it.
    """

    conversation: Conversation
    where: str
    image: str | None = None

    @property
    def text(self) -> str:
        """The last thing that the user says."""
        return self.conversation.messages[-1].content

    @property
    def told(self) -> dict[str, str]:
        """What a row with its reply says of it."""
        return {"prompt": self.text} | ({} if self.image is None else {"image": self.image})


def ask(text: str, system: str | None, where: str) -> Question:
    """Return the question of one text, behind the system message where there is one. UserError for an empty text."""
    if not text.strip():
        raise UserError(f"{where} is empty", "give a text")
    for part in (text, system or ""):
        try:
            part.encode("utf-8")
        except UnicodeEncodeError:  # bytes of the command line or terminal that Python could not decode
            raise UserError(f"{where} or its system message is not UTF-8", "set the terminal to UTF-8") from None
    return Question(Conversation((*system_message(system), Message("user", text))), where)


def read_questions(path: str | Path, system: str | None, what: str = "prompts_file") -> list[Question]:
    """Return the questions of a file, in order. what: the flag that names it.

    .json, .jsonl: rows as for training; the question is the conversation up to its last reply, which need not be
    there; also {prompt: text}, or texts. Any other file: one a line, blank lines left out. Raises UserError (file, row
    or line) for what cannot be read or holds no question.
    """
    path = Path(path)
    if path.suffix.lower() in ROWS:
        return [_of_row(row, system, f"{path} row {number}") for number, row in enumerate(read_rows(path))]
    # A line may hold other separators, as U+2028; strip() takes a carriage return.
    lines = read_text(path, what=what).split("\n")
    questions = [
        ask(line.strip(), system, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not questions:
        raise UserError(f"{what} {path} holds no prompts", "write one a line")
    return questions


def encode(template: ChatTemplate, question: Question, context: int) -> list[int]:
    """Return the tokens that the reply starts from. Raises UserError where they leave no room for one in the context.
    """
    size = sum(len(message.content) for message in question.conversation.messages)
    if size > context * template.longest_token:  # before it is rendered, which takes long
        raise UserError(
            f"{question.where}: {size:,} characters leave no room for a reply in a context of {context} tokens",
            "shorten it",
        )
    try:
        ids = template.prompt(question.conversation)
    except UserError as error:
        raise UserError(f"{question.where}: {error.message}", error.hint) from None
    if len(ids) >= context:
        raise UserError(
            f"{question.where}: {len(ids)} tokens leave no room for a reply in a context of {context}",
            "shorten it, or raise --seq_length where it is given",
        )
    return ids


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Return a reply as text, without special tokens."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_token_ids(folder: str | Path, template: ChatTemplate) -> tuple[int, ...]:
    """Return where a reply ends: the template's end token, and the eos of generation_config.json, else of config.json,
    else of the tokenizer. Raises UserError for a file that is not what it should be.
    """
    found = eos_token_ids(folder)
    return tuple(sorted({template.end_token_id, *found} if found else set(template.stop_token_ids)))


def unseen_stops(tokenizer: Any, stops: Sequence[str]) -> list[int]:
    """Return the token ids of the `stops` that are special tokens, which leave no text to be found in a reply."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[stop] for stop in stops if stop in vocabulary and not decode(tokenizer, [vocabulary[stop]])]


def _of_row(row: object, system: str | None, where: str) -> Question:
    asked = to_question(row, where)
    if system is not None and asked.messages[0].role == "system":
        raise UserError(f"{where}: has a system message of its own", "leave --system out, or take it out of the row")
    return Question(replace(asked, messages=(*system_message(system), *asked.messages)), where)


def system_message(system: str | None) -> Sequence[Message]:
    """Return the system message that stands before a question, where there is one."""
    return () if system is None else (Message("system", system),)
