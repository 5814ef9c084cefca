"""Values of flags as they were given: on the command line, in a YAML file, or by name from Python."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.errors import UserError
from megalora.files import YAML_BYTES, read_text, yaml_pairs
from megalora.flags.elsewhere import advice
from megalora.flags.flag import Flag, show
from megalora.flags.rules import Rule, no_effect
from megalora.recipes import PREFIX, recipe_file

# Several names of one choice: where the command line gives one, the file's are left out.
_ONE_CHOICE = (
    {"dtype", "fp16", "bf16"},
    {"warmup_steps", "warmup_ratio"},
    {"global_batch_size", "gradient_accumulation_steps"},
    {"per_device_train_batch_size", "max_tokens_per_microbatch"},
    {"eval_data_path", "eval_fraction"},
)


@dataclass(frozen=True)
class Given:
    """A value that was given, and how to name it in an error: `--seed`, `run.yaml: seed`, or `seed` (Python)."""

    value: Any
    label: str
    from_file: bool = False


def read(
    source: Sequence[str] | Mapping[str, Any], table: Mapping[str, Flag], elsewhere: Mapping[str, str]
) -> dict[str, Given]:
    """Return all values that were given, those of `source` before those of the YAML file that it may name.

    source     words of a command line, or values by name from Python
    elsewhere  what the flags belong to that `table` lacks, for the error
    """
    if isinstance(source, Mapping):
        config, given = _read_keywords(source, table, elsewhere)
    else:
        config, given = _read_command_line(source, table, elsewhere)
    if config is None:
        return given
    from_file = _read_yaml(config, table, elsewhere)
    for names in _ONE_CHOICE:
        if names & given.keys():
            from_file = {name: one for name, one in from_file.items() if name not in names}
    return {**from_file, **given}


def without_idle(given: Mapping[str, Given], table: Mapping[str, Flag], rules: Sequence[Rule]) -> dict[str, Given]:
    """Raise UserError for a flag that was given and has no effect.

    But a flag on the command line may switch off what depends on it in the file (`run.yaml --save false`):
    that is then left out.
    """
    values = {name: given[name].value if name in given else one.default for name, one in table.items()}
    kept = dict(given)
    for rule in rules:
        if rule.flag not in given or not rule.when(values):
            continue
        one, because = given[rule.flag], given.get(rule.because)
        if one.from_file and because is not None and not because.from_file:
            del kept[rule.flag]
        elif one.value is not False:
            raise no_effect(rule.flag, one.value, values, one.label)
    return kept


def require(given: Mapping[str, Given], table: Mapping[str, Flag], dashes: str) -> None:
    """Raise UserError that names every required flag that was not given, after `dashes`."""
    missing = [one for one in table.values() if one.required and one.name not in given]
    if missing:
        *others, last = (f"{dashes}{one.name}" for one in missing)
        names = f"{', '.join(others)} and {last}" if others else last
        told = (f"{one.name} is the {one.help.removeprefix('the ')}" for one in missing)
        raise UserError(f"{names} must be given", "; ".join(told))


def _read_command_line(
    argv: Sequence[str], table: Mapping[str, Flag], elsewhere: Mapping[str, str]
) -> tuple[str | None, dict[str, Given]]:
    """Return (path of the YAML file or None, values by name)."""
    words = list(argv)
    config = words.pop(0) if words and _names_file(words[0]) else None
    given: dict[str, Given] = {}
    while words:
        word = words.pop(0)
        if not re.match(r"--?[A-Za-z]", word):
            raise UserError(
                f"unexpected argument {word!r}", "write flags as --name value, and put values with spaces in quotes"
            )
        spelling, equals, attached = word.partition("=")
        name = spelling.lstrip("-").replace("-", "_")
        values = [attached] if equals else []
        entry = table.get(name)
        takes = len(words) if entry is not None and entry.many else 1
        while not equals and words and not words[0].startswith("--") and len(values) < takes:
            values.append(words.pop(0))
        if name == "config":
            if config is not None or len(values) != 1:
                raise UserError("--config takes one YAML file, given once", "put all flags in one file")
            config = values[0]
            continue
        if entry is None or not spelling.startswith("--"):
            raise _unknown(f"flag {spelling}", name, [*table, "config"], elsewhere, "--")
        _keep(given, entry, values, f"--{name}")
    return config, given


def _names_file(word: str) -> bool:
    return word.startswith(PREFIX) or (word.endswith((".yaml", ".yml")) and word[0] != "-")


def _keep(given: dict[str, Given], entry: Flag, words: list[str], label: str) -> None:
    """Add the value of the words after a flag to those that were given."""
    if not words and entry.type is bool:
        words = ["true"]
    if not words:
        dashes = f"; write a value that starts with -- as {label}=VALUE" if entry.type is str else ""
        raise UserError(f"{label} has no value", f"give {entry.expected()}{dashes}")
    value = entry.from_text(words, label)
    if entry.name in given and given[entry.name].value != value:
        raise UserError(f"{label} is given twice, as {show(given[entry.name].value)} and as {show(value)}", "keep one")
    given[entry.name] = Given(value, label)


def _read_keywords(
    values: Mapping[str, Any], table: Mapping[str, Flag], elsewhere: Mapping[str, str]
) -> tuple[str | None, dict[str, Given]]:
    """Return (path of the YAML file or None, values by name). None is taken for not given where that is the default."""
    given = {}
    for name, value in values.items():
        if name == "config":
            continue
        if name not in table:
            raise _unknown(f"argument {name}", name, [*table, "config"], elsewhere, "")
        if value is not None or not table[name].optional:
            given[name] = Given(table[name].from_python(value, name), name)
    config = values.get("config")
    return None if config is None else str(config), given


def _read_yaml(path: str, table: Mapping[str, Flag], elsewhere: Mapping[str, str]) -> dict[str, Given]:
    given: dict[str, Given] = {}
    for name, value in _load_yaml(path):
        label = f"{path}: {name}"
        if name == "config":
            raise UserError(f"{label} is not allowed: one YAML file cannot name another", "copy its keys here")
        if name not in table:
            raise _unknown(f"key {name} in {path}", str(name), table, elsewhere, "")
        if name in given:
            raise UserError(f"{label} is given twice", "keep one")
        if value is None and not table[name].optional:
            raise UserError(f"{label} has no value", f"give {table[name].expected()}, or remove the key")
        read = None if value is None else table[name].from_yaml(value, label)
        given[name] = Given(read, label, from_file=True)
    return {name: one for name, one in given.items() if one.value is not None}


def _load_yaml(path: str) -> list[tuple[Any, Any]]:
    """Return (key, value) pairs of the file's top level, doubles included: a dict would lose them."""
    import yaml

    if path.startswith(PREFIX):
        path = str(recipe_file(path.removeprefix(PREFIX)))
    advice = "write one `name: value` per line"
    text = read_text(Path(path), what="config", most=YAML_BYTES)
    try:
        pairs = yaml_pairs(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UserError(f"config {path}{where} is not valid YAML ({problem})", advice) from error
    if pairs is None:
        raise UserError(f"config {path} holds no flags", advice)
    for name, _ in pairs:
        if isinstance(name, (list, dict, set)):
            raise UserError(f"config {path}: {name!r:.100} is not the name of a flag", advice)
    return pairs


def _unknown(what: str, name: str, known: Iterable[str], elsewhere: Mapping[str, str], dashes: str) -> UserError:
    if name in elsewhere:
        return UserError(f"{what} belongs to {elsewhere[name]}", "leave it out here")
    known = list(known)
    ours = advice(name, known)
    if ours is not None:
        return UserError(f"unknown {what}", ours)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"did you mean {dashes}{nearest[0]}? " if nearest else ""
    return UserError(f"unknown {what}", f"{guess}--help lists all flags")
