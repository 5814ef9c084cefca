"""Console, files and events as one object, silent on other ranks."""

import json
import threading
import time

import pytest

from megalora.errors import UserError
from megalora.monitor import Monitor

RECORD = {
    "step": 1,
    "loss": 1.25,
    "learning_rate": 2e-4,
    "grad_norm": 0.5,
    "tokens": 64,
    "tokens_per_second": 12.5,
}


def use(monitor):
    with monitor:
        monitor.summary({"model": {"layers": 2}})
        monitor.progress(1)
        monitor.step(RECORD)
        monitor.evaluation({"step": 1, "loss": 1.0, "perplexity": 2.7})
        monitor.note("a note")
    monitor.close()
    monitor.note("too late")


def test_rank_0(tmp_path, capsys):
    use(Monitor(tmp_path / "a" / "run", 0, 10))
    assert json.loads((tmp_path / "a/run/metrics.jsonl").read_text()) == RECORD
    assert json.loads((tmp_path / "a/run/eval_metrics.jsonl").read_text())["perplexity"] == 2.7
    assert list((tmp_path / "a/run/runs").glob("events*"))
    out = capsys.readouterr().out
    assert "layers" in out and "step 1/10" in out and "a note" in out and "too late" not in out


def test_other_ranks_are_silent(tmp_path, capsys):
    use(Monitor(tmp_path / "run", 1, 10))
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_closes_on_an_error(tmp_path):
    monitor = Monitor(tmp_path, 0, 10)
    with pytest.raises(RuntimeError), monitor:
        raise RuntimeError
    monitor.note("after the end: nothing")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir .*file.* cannot be written"):
        Monitor(tmp_path / "file", 0, 10)


def test_a_folder_that_is_removed_while_a_run_writes_to_it(tmp_path, monkeypatch):
    """One line, and no traceback of the thread that writes TensorBoard's events."""
    ended = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    hook = threading.excepthook
    monitor, step = Monitor(tmp_path / "run", 0, 10**6), 0
    monitor.step(RECORD)
    # moved, in one step: while a folder is emptied file by file, the thread could open its file in it
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    while not monitor.failed:
        step += 1
        monitor.step(RECORD | {"step": step})
        time.sleep(0.01)  # the thread writes at most every two minutes, but when its first line comes
        assert step < 1000
    with pytest.raises(UserError, match=r"run: is gone, so that step \d+ cannot be logged: .* it begins anew"):
        monitor.check()
    monitor.close()
    assert ended == [] and threading.excepthook is hook
