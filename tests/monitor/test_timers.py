"""Every moment is counted once, for the innermost phase."""

import contextlib
import time

import pytest
import torch

from megalora.monitor import Timers, timers


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def test_nested_phases_are_exclusive(clock):
    measure = Timers(True, "cpu", clock)
    clock.sleep(50)  # before any phase: nobody's
    with measure("forward"):
        clock.sleep(1)
        with measure("communication"):
            clock.sleep(2)
        clock.sleep(4)
    clock.sleep(50)
    with measure("backward"):
        clock.sleep(8)
        with measure("communication"):
            clock.sleep(16)
    assert measure.collect() == {"forward": 5, "backward": 8, "communication": 18}
    assert measure.collect() == {}


def test_a_phase_inside_itself_counts_once(clock):
    measure = Timers(True, "cpu", clock)
    with measure("forward"), measure("forward"):
        clock.sleep(3)
    assert measure.collect() == {"forward": 3}


def test_an_open_phase_goes_on_after_collect(clock):
    measure = Timers(True, "cpu", clock)
    with measure("data"):
        clock.sleep(1)
        assert measure.collect() == {"data": 1}
        clock.sleep(2)
    assert measure.collect() == {"data": 2}


def test_an_error_ends_its_phase(clock):
    measure = Timers(True, "cpu", clock)
    with contextlib.suppress(RuntimeError), measure("forward"):
        clock.sleep(1)
        raise RuntimeError
    clock.sleep(9)
    assert measure.collect() == {"forward": 1}


def test_marks_are_folded_as_they_come(clock, monkeypatch):
    monkeypatch.setattr(timers, "_FOLD_AT", 8)
    measure = Timers(True, "cpu", clock)
    for _ in range(100):
        with measure("forward"):
            clock.sleep(1)
    assert len(measure._marks) < 10
    assert measure.collect() == {"forward": 100}


def test_unknown_phase():
    with pytest.raises(AssertionError), Timers(True)("lunch"):
        pass


def test_disabled_measures_nothing_and_costs_next_to_nothing():
    def never():
        raise AssertionError("the clock was read")

    measure = Timers(False, "cuda", never)  # makes no CUDA event either: this machine may have no GPU
    assert measure("forward") is measure("backward")
    start = time.thread_time()
    for _ in range(10_000):
        with measure("forward"):
            pass
    assert time.thread_time() - start < 0.5
    assert measure.collect() == {}


def test_events_are_read_only_once_reached(monkeypatch):
    """The CUDA path with a fake device that runs behind the host."""
    clock, made = Clock(), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            made.append(self)

        def record(self):
            self.at, self.done = clock(), False

        def query(self):
            return self.done

        def synchronize(self):
            for event in made:
                event.done = True

        def elapsed_time(self, end):
            assert self.done and end.done
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timers, "_FOLD_AT", 4)
    measure = Timers(True, torch.device("cuda", 0))
    for _ in range(5):
        with measure("forward"):
            clock.sleep(1)
            with measure("communication"):
                clock.sleep(2)
    assert len(made) == 20  # nothing reached yet: all are kept
    assert measure.collect() == {"forward": 5, "communication": 10}
    with measure("forward"):
        clock.sleep(1)
    assert len(made) == 21  # the one that closed collect; the rest are used again
    assert measure.collect() == {"forward": 1}


@pytest.mark.gpu
def test_gpu_time():
    measure = Timers(True, "cuda")
    x = torch.randn(4096, 4096, device="cuda")
    with measure("forward"):
        for _ in range(20):
            x = x @ x / 4096
        with measure("communication"):
            x.sum()
    host = time.perf_counter()
    x @ x
    torch.cuda.synchronize()
    seconds = measure.collect()
    assert 0 < seconds["communication"] < seconds["forward"] < 10
    assert time.perf_counter() - host < 10
