"""metrics.png: drawn where matplotlib is installed, and nothing without it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from runs_on_disk import make_run
from waiting import PATIENCE

from megalora.runs.curves import PICTURE, write_curves


def test_without_matplotlib_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert write_curves(make_run(tmp_path / "out", steps=3)) is None
    assert not (tmp_path / "out" / PICTURE).exists()


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'megalora[plots]'")
    run = make_run(tmp_path / "out", steps=2000, evaluations=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2001, "loss": float("nan"), "learning_rate": 0.1}) + "\n")
    assert write_curves(run) == run / PICTURE
    one = (run / PICTURE).read_bytes()
    assert one.startswith(b"\x89PNG\r\n") and len(one) > 10_000
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2002, "loss": 9.0}) + "\n")
    write_curves(run)
    assert (run / PICTURE).read_bytes() != one, "it shows the loss"
    empty = make_run(tmp_path / "empty")
    assert write_curves(empty) is None


def test_it_waits_for_the_end_to_be_imported():
    code = "import sys, megalora.stepping; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
