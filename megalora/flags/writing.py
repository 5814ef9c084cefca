"""Arguments back into the YAML file that gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalora.flags.flag import Section, flags_of
from megalora.flags.parsing import FinetuneArguments


def changed(section: Section) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each flag of a section that is not at its default."""
    kind: type = type(section)
    for one in flags_of(kind):
        value = getattr(section, one.name)
        if one.required or value != one.default:
            yield one.name, list(value) if isinstance(value, tuple) else value


def settings_of(arguments: FinetuneArguments) -> dict[str, Any]:
    """Return the flags of a run that are not at their defaults, by name."""
    sections: tuple[Section, ...] = (arguments.model, arguments.parallel, arguments.data, arguments.train)
    return {name: value for section in sections for name, value in changed(section)}


def settings_text(arguments: FinetuneArguments) -> str:
    """Return the flags of a run that are not at their defaults, as YAML under titles."""
    import yaml

    lines = []
    for title, section in (
        ("model", arguments.model),
        ("layout", arguments.parallel),
        ("data", arguments.data),
        ("training", arguments.train),
    ):
        values = dict(changed(section))
        if values:
            text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
            lines += ["", f"# {title}", text.rstrip("\n")]
    return "\n".join(lines[1:]) + "\n"


def run_yaml(arguments: FinetuneArguments, folder: str, version: str) -> str:
    """Return a YAML file with which `megalora finetune` starts the run of `arguments` again.

    folder   where it was started: relative paths are meant from there
    """
    head = f"# megalora {version}, started in {folder}; flags that are not here have their defaults"
    return f"{head}\n\n{settings_text(arguments)}"
