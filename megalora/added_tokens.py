"""Tokens that a tokenizer has beyond those of its model's folder: described, and written into a tokenizer's files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megalora.errors import UserError
from megalora.files import write_file
from megalora.tokenizer_files import CONFIG_FILE, TOKENIZER_FILE, read_fields

_LISTS = ("extra_special_tokens", "additional_special_tokens")  # names of one list: of transformers 5, of 4


@dataclass(frozen=True)
class AddedToken:
    """One entry of `added_tokens` in tokenizer.json, by the names of its fields."""

    id: int
    content: str
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


def added_tokens_of(entries: object, where: str) -> tuple[AddedToken, ...]:
    """Return the tokens of a list of entries, by id. Raises UserError where it is no such list."""
    names = {field.name: field.type for field in fields(AddedToken)}
    try:
        found = [AddedToken(**{k: v for k, v in entry.items() if k in names}) for entry in entries]  # type: ignore
        good = all(isinstance(t.id, int) and isinstance(t.content, str) and t.content for t in found)
    except (TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{where}: its list of added tokens is damaged", "copy it again")
    return tuple(sorted(found, key=lambda token: token.id))


def entries_of(tokens: Sequence[AddedToken]) -> list[dict[str, Any]]:
    """Return the tokens as `added_tokens_of` reads them."""
    return [asdict(token) for token in tokens]


def add_to_files(folder: str | Path, tokens: Sequence[AddedToken]) -> None:
    """Add tokens to the files of the tokenizer in `folder`, which has a tokenizer.json.

    Raises UserError for a file that cannot be read, OSError for one that cannot be written.
    """
    folder = Path(folder)
    whole = read_fields(folder / TOKENIZER_FILE)
    there = whole.setdefault("added_tokens", [])
    known = {entry["content"] for entry in there}
    there += [entry for entry in entries_of(tokens) if entry["content"] not in known]
    _write(folder / TOKENIZER_FILE, whole)
    for name, add in ((CONFIG_FILE, _to_config), ("special_tokens_map.json", _to_map), ("added_tokens.json", _to_ids)):
        if (folder / name).is_file():
            _write(folder / name, add(read_fields(folder / name), tokens))


def _to_config(config: Mapping[str, Any], tokens: Sequence[AddedToken]) -> dict[str, Any]:
    found = dict(config)
    if isinstance(found.get("added_tokens_decoder"), dict):
        entries = {str(entry.pop("id")): entry for entry in entries_of(tokens)}
        found["added_tokens_decoder"] = {**found["added_tokens_decoder"], **entries}
    name = next((name for name in _LISTS if isinstance(found.get(name), list)), _LISTS[-1])
    there = found.get(name)
    if there is not None and not isinstance(there, list):
        raise UserError(
            f"{name} of the tokenizer's files is {json.dumps(there)[:80]}, not a list of tokens", "copy them again"
        )
    return found | {name: [*(there or ()), *(token.content for token in tokens if token.special)]}


def _to_map(special: Mapping[str, Any], tokens: Sequence[AddedToken]) -> dict[str, Any]:
    name = next((name for name in _LISTS if isinstance(special.get(name), list)), None)
    return dict(special) if name is None else _to_config({name: special[name]}, tokens) | {
        other: value for other, value in special.items() if other != name
    }


def _to_ids(ids: Mapping[str, Any], tokens: Sequence[AddedToken]) -> dict[str, Any]:
    return dict(ids) | {token.content: token.id for token in tokens}


def _write(file: Path, found: Mapping[str, Any]) -> None:
    write_file(file, (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
