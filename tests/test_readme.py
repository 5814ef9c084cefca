"""The README says what the code does: its table of flags is the code's, and the paths it names exist."""

import re
from pathlib import Path

from megalora.arguments import flags_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_flags_is_that_of_the_code():
    assert flags_table().strip() in README, "run: python -c 'from megalora.arguments import *; print(flags_table())'"


def test_named_paths_exist():
    named = set(re.findall(r"`((?:tests|megalora|examples|docs|benchmarks|tools|scripts)/[\w./-]*)`", README))
    named |= set(re.findall(r"^(megalora/[\w./]+|benchmarks/|scripts/slurm/)\s", README, flags=re.MULTILINE))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
