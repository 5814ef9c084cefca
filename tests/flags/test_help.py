"""What --help prints, and docs/flags.md."""

import re
from pathlib import Path

import pytest
from snapshots import assert_snapshot

from megalora.flags import CONVERT_COMMANDS, FINETUNE_SECTIONS, GENERATE_SECTIONS
from megalora.flags.flag import flags_of
from megalora.flags.help import flags_page, help_text

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["finetune", "generate", "serve", "board", "report", "data", "plan", "doctor", "convert"]
COMMANDS += [f"convert {name}" for name in CONVERT_COMMANDS]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    text = help_text(command)
    assert max(map(len, text.splitlines())) <= 120
    assert_snapshot(f"help_{command.replace(' ', '_')}", text)


def test_help_and_page_name_every_flag():
    page = flags_page()
    for command, sections in (("finetune", FINETUNE_SECTIONS), ("generate", GENERATE_SECTIONS)):
        text = help_text(command)
        for flag in (flag for section in sections for flag in flags_of(section)):
            assert f"| `{flag.name}` |" in page
            shown = command == "finetune" or not flag.definition.training_only
            assert (f"  --{flag.name} " in text) == shown
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


def test_the_page_in_docs_is_current():
    page = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
    assert page == flags_page() + "\n", "run: python -m megalora.flags > docs/flags.md"
