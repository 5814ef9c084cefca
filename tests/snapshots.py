"""Whole outputs as text files under tests/snapshots/, so that a change of wording is seen where it is reviewed.

MEGALORA_UPDATE_SNAPSHOTS=1 writes them anew.
"""

import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "snapshots"


def assert_snapshot(name: str, text: str) -> None:
    """Fail where `text` is not that of snapshots/<name>.txt."""
    file = FOLDER / f"{name}.txt"
    text = text.rstrip("\n") + "\n"
    if os.environ.get("MEGALORA_UPDATE_SNAPSHOTS") == "1":
        file.write_text(text, encoding="utf-8")
    remedy = "if the new text is right, run this test with MEGALORA_UPDATE_SNAPSHOTS=1"
    assert file.is_file(), f"no {file}: {remedy}"
    assert text == file.read_text(encoding="utf-8"), remedy
