"""Flags for usual runs, as YAML files that open with their launch command, the GPUs they need and what they make.

`megalora recipes` lists them; `megalora finetune recipe:NAME --model_path ... ` starts one.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from megalora.errors import UserError

PREFIX = "recipe:"
FOLDER = Path(__file__).parent
_START = "megalora finetune recipe:{} --model_path {} --data_path {} --output_dir {}"
_DEMO_MODEL, _DEMO_ROWS = "models/SmolLM2-135M-Instruct", "examples/data/self_cognition.json"  # of a checkout


@dataclass(frozen=True)
class Recipe:
    """What the head of a recipe says. gpus: "2 x 80 GB", or "none"."""

    name: str
    what: str
    launch: str
    model: str
    gpus: str
    makes: str


def recipes() -> list[Recipe]:
    """Return all recipes, by name."""
    return [_read(file) for file in sorted(FOLDER.glob("*.yaml"))]


def recipe_file(name: str) -> Path:
    """Return the YAML file of a recipe. Raises UserError that names the nearest where there is none."""
    file = FOLDER / f"{name}.yaml"
    names = [path.stem for path in sorted(FOLDER.glob("*.yaml"))]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        guess = f"did you mean {PREFIX}{nearest[0]}? " if nearest else ""
        raise UserError(f"unknown {PREFIX}{name}", f"{guess}megalora recipes lists them all")
    return file


def listing() -> str:
    """Return the table that `megalora recipes` prints."""
    found = recipes()
    width = max(len(recipe.name) for recipe in found)
    gpus = max(len(recipe.gpus) for recipe in found)
    lines = [f"{recipe.name:{width}}  {recipe.gpus:{gpus}}  {recipe.what}" for recipe in found]
    start = f"start one: {_START.format('NAME', 'DIR', 'rows.jsonl', 'out')}"
    tried = f"try one here: {_START.format('laptop', _DEMO_MODEL, _DEMO_ROWS, 'build/recipe')}"
    here = [tried] if Path(_DEMO_MODEL).is_dir() and Path(_DEMO_ROWS).is_file() else []
    return "\n".join([*lines, "", f"flags of each, to copy and change: {FOLDER}", start, *here])


def _read(file: Path) -> Recipe:
    head = [line[1:].strip() for line in file.read_text(encoding="utf-8").split("\n\n")[0].splitlines()]
    fields: dict[str, str] = {}
    name = ""
    for line in head[1:]:
        match = re.match(r"(\w+): +(.*)", line)
        if match:
            name = match[1]
            fields[name] = match[2]
        elif name and line:
            fields[name] = fields[name].removesuffix("\\").rstrip() + " " + line
    return Recipe(file.stem, head[0], **fields)
