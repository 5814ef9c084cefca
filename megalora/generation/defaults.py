"""How a model wants to be sampled: generation_config.json, whose values hold where the command line says nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalora.errors import UserError
from megalora.files import read_json

FILE = "generation_config.json"
_LARGEST_FILE = 1 << 20  # bytes
_LARGEST = 1 << 31  # of any number

# Fields of sampling -> (what is right, in words, whether a value is right).
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number, at least 0", lambda value: _number(value) and value >= 0),
    "top_k": ("a whole number, at least 0", lambda value: _number(value) and value == int(value) and value >= 0),
    "top_p": ("a number above 0, at most 1", lambda value: _number(value) and 0 < value <= 1),
    "min_p": ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1),
    "repetition_penalty": ("a number above 0", lambda value: _number(value) and value > 0),
}


# Fields with which transformers replies otherwise, and which are not implemented -> values that change nothing.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0, 0.0),
    "penalty_alpha": (0, 0.0),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1, 1.0),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "exponential_decay_length_penalty": (),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
}
_OF_BEAMS = {"length_penalty": (1, 1.0), "early_stopping": (False,)}  # which mean nothing without beams


def not_applied(folder: str | Path) -> str | None:
    """Return a line on what a model's generation_config.json asks for and replies here do without; None where nothing.

    Without that file transformers takes the fields of config.json, as it saved them there at first (BART).
    """
    file = Path(folder) / FILE
    file = file if file.exists() else Path(folder) / "config.json"
    fields = _read(file)
    known = _NOT_APPLIED | (_OF_BEAMS if fields.get("num_beams") not in (None, 1) else {})
    asked = {name: fields[name] for name, without in known.items() if fields.get(name) not in (None, *without)}
    if not asked:
        return None
    told = ", ".join(f"{name} {value!r:.40}" for name, value in asked.items())
    return f"not applied in generation, though {file.name} of the model asks for it: {told}"


def sampling_defaults(folder: str | Path) -> dict[str, float]:
    """Return the fields of sampling that a model's generation_config.json sets, by the names of the flags.

    As in transformers, temperature, top_k, top_p and min_p hold where do_sample is true only. Raises UserError for a
    value that is none.
    """
    file = Path(folder) / FILE
    fields = _read(file)
    found = {}
    for name, (right, is_right) in _FIELDS.items():
        value = fields.get(name)
        if value is None:
            continue
        if not is_right(value):
            raise UserError(f"{file}: {name} = {value!r} is not valid", f"give {right}")
        if name == "repetition_penalty" or fields.get("do_sample") is True:
            found[name] = value
    if fields.get("do_sample") is True:
        found.setdefault("temperature", 1.0)
    return found


def eos_token_ids(folder: str | Path) -> list[int]:
    """Return where replies of a model end: the eos of generation_config.json, else of config.json; none where neither
    says. Raises UserError for a file that is not what it should be."""
    for name in (FILE, "config.json"):
        if found := _eos(Path(folder) / name):
            return found
    return []


def beginning(folder: str | Path, start: int, forced: int | None, words: int) -> tuple[int, ...]:
    """Return what an encoder-decoder begins with: decoder_start_token_id, and forced_bos_token_id where there is one.

    start, forced  those of config.json; generation_config.json goes before it, as in transformers
    words          rows of the vocabulary. Raises UserError for what is no token of it
    """
    file = Path(folder) / FILE
    fields = _read(file)
    found = []
    for name, value in (("decoder_start_token_id", start), ("forced_bos_token_id", forced)):
        value = value if fields.get(name) is None else fields[name]
        if value is not None and not (_is_id(value) and 0 <= value < words):
            raise UserError(f"{file}: {name} = {value!r} is not valid", f"give a token id below {words:,}")
        found += [] if value is None else [value]
    return tuple(found)


def unescaped(text: str) -> str:
    r"""Return a text with \n, \t, \r and \\ as the characters that they mean; any other backslash stays."""
    meant = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    out, at = [], 0
    while at < len(text):
        pair = text[at : at + 2]
        known = len(pair) == 2 and pair[0] == "\\" and pair[1] in meant
        out.append(meant[pair[1]] if known else text[at])
        at += 2 if known else 1
    return "".join(out)


def _eos(file: Path) -> list[int]:
    """Return the eos_token_id of a JSON file: one, several or none."""
    value = _read(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(_is_id, ids)):
        raise UserError(f"{file}: eos_token_id = {value!r} is not valid", "give a token id or a list of them")
    return ids


def _read(file: Path) -> dict[str, Any]:
    """Return the fields of a JSON file; none where there is no file."""
    if not file.exists():
        return {}
    return read_json(file, "download it again", most=_LARGEST_FILE)


def _is_id(value: Any) -> bool:
    """Return whether a value may be a token id; some files have -1 for none."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
