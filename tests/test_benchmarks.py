"""benchmarks/: RESULTS.md is current, what `record` writes becomes a section of it, and our linear is called right."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """A function that imports a script of benchmarks/, as they import one another."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield __import__
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def test_the_page_is_current(benchmark):
    results = benchmark("results")
    assert results.PAGE.read_text(encoding="utf-8") == results.page(), "run: python benchmarks/results.py"


def test_a_record_becomes_a_section(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/any.py", "--only", "a b"])
    file = tmp_path / "any.json"
    benchmark("common").record(file, "Any", "Of tests.", "a card", ("what", "ms"), [("this", 2)], {"ms": 2.0})
    section = benchmark("results").section(file)
    assert "## Any" in section and "Card: a card. torch: " + torch.__version__ in section
    assert "python benchmarks/any.py --only 'a b'" in section and "| this | 2 |" in section
    assert json.loads(file.read_text())["figures"] == {"ms": 2.0}


@pytest.mark.parametrize("change", [{"commit": ""}, {"card": None}, {"rows": [["one cell"]]}])
def test_a_result_without_commit_or_card_is_refused(benchmark, tmp_path, change):
    good = {"title": "t", "about": "a", "commands": ["c"], "card": "c", "torch": "2", "commit": "1"}
    good |= {"columns": ["a", "b"]}
    file = tmp_path / "odd.json"
    file.write_text(json.dumps(good | {"rows": [["x", "y"]]} | change))
    with pytest.raises(ValueError, match="odd.json"):
        benchmark("results").section(file)


def test_the_linear_that_is_timed_is_right(benchmark):
    lora_linear = benchmark("lora_linear")
    case = lora_linear.Case(lora_linear.Shape(8, 16, 24, 4, 0.0), torch.device("cpu"), torch.float64)
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.A, case.B))
    y = x @ case.W.T + x @ A.T @ B.T * lora_linear.SCALING
    expected = [y.detach(), *torch.autograd.grad(y, (x, A, B), case.dy)]
    for ours, theirs in zip(lora_linear.megalora_linear(case, 4)(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
