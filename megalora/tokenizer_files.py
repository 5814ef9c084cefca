"""The files of a tokenizer and its chat template in a folder: found, copied and removed, without loading it."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from megalora.errors import UserError
from megalora.files import read_json, read_text, write_file

TOKENIZER_FILE, SENTENCEPIECE_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
TEMPLATE_FILE, TEMPLATES_FOLDER = "chat_template.jinja", "additional_chat_templates"
TEMPLATE_BYTES = 4 << 20
VOCABULARIES = (TOKENIZER_FILE, SENTENCEPIECE_FILE, "spiece.model", "vocab.json", "vocab.txt")
FILES = (*VOCABULARIES, CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "merges.txt")


def has_tokenizer(folder: str | Path) -> bool:
    """Return whether there are files of a tokenizer in a folder."""
    return any((Path(folder) / name).is_file() for name in VOCABULARIES)


def write_tokenizer(source: str | Path, target: str | Path, chat_template: str | None = None) -> None:
    """Copy the tokenizer files of one folder into another, which is made if it is missing.

    chat_template  jinja source that replaces the template of the source folder; None: the source's own goes along
    What would make transformers run code (`auto_map`) is left out. Raises UserError where a file cannot be written.
    """
    source, target = Path(source), Path(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (source / name).is_file() and name != CONFIG_FILE:
                _copy(source / name, target / name)
        if (source / CONFIG_FILE).is_file():
            fields = read_fields(source / CONFIG_FILE)
            fields.pop("auto_map", None)
            _write_json(target / CONFIG_FILE, fields)
        if chat_template is not None:
            write_template(target, chat_template)
            return
        if (source / TEMPLATE_FILE).is_file():
            _copy(source / TEMPLATE_FILE, target / TEMPLATE_FILE)
        if (source / TEMPLATES_FOLDER).is_dir():
            (target / TEMPLATES_FOLDER).mkdir(exist_ok=True)
            for file in sorted((source / TEMPLATES_FOLDER).glob("*.jinja")):
                _copy(file, target / TEMPLATES_FOLDER / file.name)
    except OSError as error:
        raise UserError(
            f"{target}: the tokenizer cannot be written ({error.strerror})", "free space, or name another folder"
        ) from None


def remove_tokenizer(folder: str | Path) -> None:
    """Remove the files that `write_tokenizer` writes. Raises OSError where one may not be removed."""
    folder = Path(folder)
    templates = list((folder / TEMPLATES_FOLDER).glob("*.jinja"))
    for file in [*(folder / name for name in (*FILES, TEMPLATE_FILE)), *templates]:
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds other things, or is not there
        (folder / TEMPLATES_FOLDER).rmdir()


def write_template(folder: str | Path, chat_template: str) -> None:
    """Make `chat_template` the one template of the tokenizer in `folder`, wherever transformers looks for one.

    Raises UserError where the tokenizer's config cannot be read, OSError where a file cannot be written.
    """
    folder = Path(folder)
    write_file(folder / TEMPLATE_FILE, chat_template.encode())
    shutil.rmtree(folder / TEMPLATES_FOLDER, ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    if (folder / CONFIG_FILE).is_file():
        _write_json(folder / CONFIG_FILE, read_fields(folder / CONFIG_FILE) | {"chat_template": chat_template})


def read_template(folder: str | Path) -> str | None:
    """Return the one chat template that a folder's files give, or None. Raises UserError where one cannot be read."""
    file = Path(folder) / TEMPLATE_FILE
    if file.is_file():
        return read_text(file, most=TEMPLATE_BYTES)
    config = Path(folder) / CONFIG_FILE
    found = read_fields(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None


def read_fields(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, with a byte order mark or not. Raises UserError."""
    return read_json(file, "copy it again")


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as stream:
        write_file(target, lambda out: shutil.copyfileobj(stream, out))


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    write_file(file, (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode())
