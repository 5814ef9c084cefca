"""Signal handlers write past print(), which they may have interrupted, and survive a reader that is gone."""

import os
import signal
import sys
import threading

import pytest

from megalora.cluster.preemption import CTRL_C, MARK, Preemption
from megalora.generation.dialogue import Chat
from megalora.serve import _Stop
from megalora.serving.backlog import Backlog


class Busy:
    """A stream in the middle of a print(): whoever comes in between is refused, as by io.BufferedWriter."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError("reentrant call")


@pytest.fixture(params=["a run", "a server", "a dialogue"])
def ctrl_c(request, monkeypatch):
    """What Ctrl-C does there, and a word of what it says."""
    monkeypatch.delenv(MARK, raising=False)
    if request.param == "a run":
        with Preemption() as preemption:
            preemption.steps()
            yield preemption._interrupt, "saving after this step", lambda: preemption.signal_name == CTRL_C
    elif request.param == "a server":
        backlog = Backlog(1, 1)
        yield _Stop(backlog, 60.0), "a second signal ends them", lambda: backlog.closed
    else:
        chat = Chat(None, None, None, None, 64, 0, (False,))
        yield chat._interrupt, "/help lists the commands", chat.interrupted


def test_ctrl_c_may_interrupt_a_print(ctrl_c, monkeypatch, capfd):
    handler, said, heard = ctrl_c
    threads = threading.active_count()
    monkeypatch.setattr(sys, "stderr", Busy())
    monkeypatch.setattr(sys, "stdout", Busy())
    handler(signal.SIGINT, None)
    monkeypatch.undo()
    assert said in capfd.readouterr().err and heard()
    assert threading.active_count() == threads, "a thread begins under a lock that the main thread may hold"


def test_ctrl_c_may_have_ended_who_reads_what_is_written(ctrl_c, capfd):
    """`megalora finetune ... 2>&1 | tee log`: the terminal gives Ctrl-C to tee as well."""
    handler, _, heard = ctrl_c
    before, (read, write) = os.dup(2), os.pipe()
    os.close(read)
    os.dup2(write, 2)
    try:
        handler(signal.SIGINT, None)
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(write)
    assert heard()
