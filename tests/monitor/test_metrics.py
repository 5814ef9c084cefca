"""metrics.jsonl: full precision, valid JSON, and after a resume as if never interrupted."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalora.monitor.metrics import EventWriter, JsonLines


def record(step, **more):
    return {"step": step, "loss": 0.1 + step, "learning_rate": 2e-4, "grad_norm": 1 / 3, "tokens": 64, **more}


def write(path, resumed_step, steps):
    lines = JsonLines(path, resumed_step)
    for step in steps:
        lines.write(record(step))
    lines.close()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_there_at_once(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write(record(1))
    assert read(tmp_path / "m.jsonl") == [record(1)]
    lines.close()


def test_a_resumed_file_is_that_of_one_run(tmp_path):
    write(tmp_path / "whole.jsonl", 0, range(1, 11))
    write(tmp_path / "m.jsonl", 0, range(1, 8))
    write(tmp_path / "m.jsonl", 5, range(6, 11))
    assert (tmp_path / "m.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.jsonl", "whole.jsonl"]


def test_a_torn_line_goes(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 0, [1, 2])
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    write(path, 2, [3])
    assert [line["step"] for line in read(path)] == [1, 2, 3]


def test_a_fresh_run_starts_empty(tmp_path):
    write(tmp_path / "m.jsonl", 0, [1, 2])
    write(tmp_path / "m.jsonl", 0, [1])
    assert [line["step"] for line in read(tmp_path / "m.jsonl")] == [1]


@given(st.floats(), st.floats())
def test_any_number(tmp_path_factory, loss, inner):
    path = tmp_path_factory.mktemp("metrics") / "m.jsonl"
    lines = JsonLines(path)
    lines.write(record(1, loss=loss, phases={"forward": inner}))
    lines.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["loss"] == (loss if math.isfinite(loss) else None)
    assert line["phases"]["forward"] == (inner if math.isfinite(inner) else None)
    assert line.get("skipped", False) == (not math.isfinite(loss))


def test_tensorboard(tmp_path):
    first = EventWriter(tmp_path)
    for step in (1, 2, 3):
        first.write(record(step, phases={"forward": 0.5}), "train")
    first.close()
    second = EventWriter(tmp_path, resumed_step=2)
    second.write(record(3, loss=9.0, grad_norm=math.nan), "train")
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(one.step, round(one.value, 3)) for one in events.Scalars("train/loss")] == [
        (1, 1.1),
        (2, 2.1),
        (3, 9.0),
    ]
    assert "train/phases/forward" in events.Tags()["scalars"]
    assert [one.step for one in events.Scalars("train/grad_norm")] == [1, 2]
