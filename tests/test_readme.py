"""The paths that the README names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_named_paths_exist():
    named = set(re.findall(r"`((?:tests|megalora|examples|docs|benchmarks|tools|scripts)/[\w./-]*)`", README))
    named |= set(re.findall(r"^(megalora/[\w./]+|benchmarks/|scripts/slurm/)\s", README, flags=re.MULTILINE))
    named |= set(re.findall(r"\]\((docs/[\w./-]+)\)", README))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
