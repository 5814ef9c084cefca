"""Write benchmarks/RESULTS.md from benchmarks/results/*.json: python benchmarks/results.py

A file is what a benchmark writes with --output (see `record` in common.py), in order of names: title, about, commands,
card, torch, commit, columns and rows of text; `figures`, where it has them, are the numbers behind the rows.
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "RESULTS.md"
FIELDS = ("title", "about", "commands", "card", "torch", "commit", "columns", "rows")
HEAD = """# Results

Written by `python benchmarks/results.py` from `benchmarks/results/`: do not edit this page. Compare only within one
machine and one run. What was tried, and what bounds the figures: [LOG.md](LOG.md).
How to run: [README.md](README.md)."""


def section(file: Path) -> str:
    """Return the section of one file. Raises ValueError, naming the file, where a field is missing or a row is odd."""
    found = json.loads(file.read_text(encoding="utf-8"))
    missing = [field for field in FIELDS if not found.get(field)]
    if missing:
        raise ValueError(f"{file.name}: {', '.join(missing)} missing")
    columns = found["columns"]
    odd = [row for row in found["rows"] if len(row) != len(columns)]
    if odd:
        raise ValueError(f"{file.name}: {odd[0]} has {len(odd[0])} cells for {len(columns)} columns")
    table = [columns, ["---"] * len(columns), *found["rows"]]
    return "\n".join(
        [
            f"## {found['title']}",
            "",
            found["about"],
            "",
            f"Commit: {found['commit']}. Card: {found['card']}. torch: {found['torch']}.",
            "",
            "```bash",
            *found["commands"],
            "```",
            "",
            *(f"| {' | '.join(map(str, row))} |" for row in table),
        ]
    )


def page(folder: Path = FOLDER / "results") -> str:
    """Return the whole page."""
    return "\n\n".join([HEAD, *map(section, sorted(folder.glob("*.json")))]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
