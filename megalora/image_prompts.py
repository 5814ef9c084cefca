"""What a model with images is asked: an image and a text each, from the command line or a file. On rank 0 alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalora import sources
from megalora.data import Conversation, FieldNames, Message, read_rows, to_question
from megalora.data.images import take_image
from megalora.data.pairs import read_pair
from megalora.errors import UserError
from megalora.flags import GenerationArguments
from megalora.generation.prompts import ROWS, Question, read_questions, system_message
from megalora.models.spec import ModelSpec
from megalora.pictures import Picture, find_picture

Asked = tuple[list[Question], list[Picture]]


def check_flags(options: GenerationArguments, config: ModelSpec) -> None:
    """Raise UserError for an image that the model would not read, and for a dialogue about none."""
    if config.prefix is None:
        if options.image is not None:
            raise UserError(f"image has no effect: {config.model_type} reads text alone", "leave it out")
    elif options.image is None and options.prompts_file is None:
        what = f"{config.model_type} reads an image before each text, and does not chat"
        raise UserError(what, "give image, with or without a prompt, or a prompts_file of rows with images")


def read(options: GenerationArguments, config: ModelSpec) -> Asked:
    """Return the questions and the image of each. Raises UserError for what cannot be read, by file and row.

    With image alone the text is empty; with image and a file it stands before each prompt of the file; else the rows of
    the file name their own.
    """
    prefix, path = config.prefix, Path(options.prompts_file or "")
    assert prefix is not None
    if options.image is not None:
        picture = find_picture(options.image, prefix.tokens)
        if options.prompts_file is None:
            found = [_question(options.prompt or "", options.system, "prompt")]
        elif config.encoder is not None:
            found = sources.questions(options)
        else:
            found = read_questions(path, options.system)
        return [replace(question, image=picture.path) for question in found], [picture] * len(found)
    return read_rows_with_images(path, options.system, config, "prompts_file", "give image for all of them, or")


def read_rows_with_images(path: Path, system: str | None, config: ModelSpec, flag: str, hint: str = "give") -> Asked:
    """Return the questions of a file of rows, and the image that each names. Raises UserError, by file and row.

    flag  that names the file; hint: how that for a file of another kind begins
    """
    assert config.prefix is not None
    if path.suffix.lower() not in ROWS:
        raise UserError(
            f"{flag} {path}: its lines name no images, and {config.model_type} reads one before each text",
            f"{hint} a .json or .jsonl file of rows with an image each",
        )
    found, pictures = [], []
    reader: Callable[[Any, str], str | Conversation] = _source if config.encoder is not None else to_question
    for number, row in enumerate(read_rows(path)):
        where = f"{path} row {number}"
        try:
            image, rest = take_image(row, where, FieldNames(), Counter())
            pictures.append(find_picture(image, config.prefix.tokens))
        except UserError as error:
            raise UserError(f"{where}: {error.message.removeprefix(f'{where}: ')}", error.hint) from None
        asked = reader(rest, where) if rest else ""
        if isinstance(asked, str):
            question = _question(asked, system, where)
        else:
            question = Question(replace(asked, messages=(*system_message(system), *asked.messages)), where)
        found.append(replace(question, image=pictures[-1].path))
    return found, pictures


def _source(row: Any, where: str) -> str:
    return read_pair(row, where, question=True).source


def _question(text: str, system: str | None, where: str) -> Question:
    return Question(Conversation((*system_message(system), Message("user", text))), where)
