"""The run at the terminal: plain lines in a log file, a bar on a terminal."""

import io
import os

from megalora.monitor.console import Console

RECORD = {
    "step": 4,
    "loss": 1.25,
    "learning_rate": 2e-4,
    "grad_norm": 0.5,
    "tokens": 64,
    "tokens_per_second": 1234.5,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_log_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    file, now = io.StringIO(), [0.0]
    console = Console(total_steps=10, resumed_step=2, file=file, clock=lambda: now[0])
    console.progress(3)
    now[0] = 20.0
    console.step({**RECORD, "tflops": 12.34, "phases": {"forward": 0.25, "data": 0.5}})
    console.evaluation({"step": 4, "loss": 1.0, "perplexity": 2.718281})
    console.note("[not markup] " + "long " * 60)
    console.close()
    lines = file.getvalue().splitlines()
    assert lines[0] == (
        "step 4/10  loss 1.2500  lr 2.000e-04  grad norm 0.5000  1,234 tokens/s  12.3 TFLOP/s  0:01:00 left"
    )
    assert lines[1] == "step 4 by phase: forward 0.250s  data 0.500s"
    assert lines[2] == "step 4: evaluation loss 1.0000, perplexity 2.718"
    assert lines[3].startswith("[not markup] long") and len(lines) == 4
    assert "\x1b" not in file.getvalue()


def test_a_step_without_numbers():
    file = io.StringIO()
    Console(10, file=file).step({"step": 1, "loss": float("nan"), "grad_norm": None})
    assert "loss nan" in file.getvalue() and "grad norm -" in file.getvalue()


def test_summary():
    file = io.StringIO()
    stages = "0: embedding, layers 0 to 13\n1: layers 14 to 27, head"
    Console(10, file=file).summary({"model": {"path": "some/[folder]", "layers": 28}, "layout": {"stages": stages}})
    text = file.getvalue()
    for word in (
        "model",
        "some/[folder]",
        "28",
        "layout",
        "0: embedding, layers 0 to 13",
        "1: layers 14 to 27",
    ):
        assert word in text


def test_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    file = Terminal()
    console = Console(10, resumed_step=2, file=file)
    console.note("before the bar")
    console.progress(3)
    console.step(RECORD)
    console.note("a note")
    console.close()
    console.close()
    text = file.getvalue()
    for word in ("before the bar", "loss 1.2500", "1,234 tokens/s", "4/10", "a note", "left"):
        assert word in text


def test_a_run_goes_on_where_nobody_reads_what_it_says():
    """`megalora finetune ... | tee log`: Ctrl-C ends tee too, and the run is still to save."""
    read, write = os.pipe()
    logged = []
    with os.fdopen(write, "w") as file:
        console = Console(10, file=file, log=logged.append)
        os.close(read)
        for step in (1, 2):
            console.step({**RECORD, "step": step})
        console.close()
    assert [line[:9] for line in logged] == ["step 1/10", "step 2/10"]
