"""Show the replies of two models to the same prompts side by side.

    python examples/compare.py base=build/base.jsonl tuned=build/tuned.jsonl

Each file is what `tools/generate.py --output_file` writes: JSON lines with `prompt`, `response` and
`finish_reason`, in the order of the prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def main() -> None:
    parser = argparse.ArgumentParser(description="Show replies to the same prompts side by side.")
    parser.add_argument("replies", nargs="+", metavar="TITLE=FILE", help="as tools/generate.py writes it")
    names = [name.partition("=") for name in parser.parse_args().replies]
    if not all(title and file for title, _, file in names):
        fail("give each file with its title, such as base=replies.jsonl")
    columns = {title: read_replies(Path(file)) for title, _, file in names}
    prompts = [prompt for prompt, _ in next(iter(columns.values()))]
    for title, rows in columns.items():
        if [prompt for prompt, _ in rows] != prompts:
            fail(f"{title} holds replies to other prompts than {names[0][0]}")

    table = Table(box=box.ROUNDED, show_lines=True, expand=True)
    table.add_column("prompt", ratio=2, style="bold", overflow="fold")
    for title in columns:
        table.add_column(title, ratio=4, overflow="fold")  # Chinese has no spaces to break at
    for index, prompt in enumerate(prompts):
        table.add_row(Text(prompt), *(Text(rows[index][1]) for rows in columns.values()))
    console = Console()
    # Where nobody looks (a log, CI), rich would take 80 columns, which is narrow for three.
    Console(width=console.width if console.is_terminal else 120).print(table)


def read_replies(file: Path) -> list[tuple[str, str]]:
    """(prompt, reply) of each line; a reply that was cut off at max_new_tokens ends in an ellipsis."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        fail(f"{file}: {error.strerror}")
    replies = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            cut = " ..." if row.get("finish_reason") == "length" else ""
            replies.append((row["prompt"], row["response"].strip() + cut))
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f"{file}:{number}: not a JSON object with prompt and response")
    return replies


def fail(message: str) -> None:
    sys.exit(f"compare: {message}")


if __name__ == "__main__":
    main()
