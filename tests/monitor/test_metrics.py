"""metrics.jsonl: full precision, valid JSON, and after a resume as if never interrupted."""

import json
import math
import os

import pytest
from fuzz import examples, ours_only
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalora.errors import UserError
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


@pytest.mark.parametrize(
    "line",
    [b'{"step": 1e999}\n', b"[" * 200_000 + b"\n", b'{"step": true}\n', b"7\n", b"\xff\n", b"x" * (3 << 20) + b"\n"],
)
def test_a_line_that_is_none_of_ours_is_left_out_and_said(tmp_path, line):
    path = tmp_path / "m.jsonl"
    write(path, 0, [1, 2])
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    path.write_bytes(first + line + second)
    lines = JsonLines(path, 2)
    lines.close()
    assert lines.last_step == 2 and path.read_bytes() == whole
    assert lines.damage.startswith(f"{path}: damaged lines are left out: 2")


@examples(60)
@given(st.binary(max_size=60) | st.text('{}[]",:0123456789e+-.\\\nstep', max_size=80).map(str.encode))
def test_any_bytes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(record_line(1) + data + record_line(2))

    def resumed():
        lines = JsonLines(path, 2)
        lines.close()
        assert path.read_bytes().startswith(record_line(1))

    assert ours_only(resumed)


def record_line(step):
    return f"{json.dumps(record(step))}\n".encode()


def test_half_a_line_lost_in_the_middle_is_said(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 0, range(1, 6))
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*whole[:2], whole[2][:20], *whole[3:]]))
    lines = JsonLines(path, 5)
    lines.close()
    assert [line["step"] for line in read(path)] == [1, 2, 5] and lines.damage.endswith("left out: 3")


def test_a_torn_last_line_is_no_damage(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 0, [1, 2])
    path.write_bytes(path.read_bytes()[:-9])
    lines = JsonLines(path, 2)
    lines.close()
    assert lines.last_step == 1 and lines.damage is None


def test_lines_and_events_are_not_written_behind_a_link(tmp_path):
    theirs, pipe = tmp_path / "theirs", tmp_path / "pipe"
    theirs.write_text("theirs\n")
    (tmp_path / "m.jsonl").symlink_to(theirs)
    (tmp_path / "runs").symlink_to(tmp_path)
    os.mkfifo(pipe)
    for path in (tmp_path / "m.jsonl", pipe):
        with pytest.raises(UserError, match=f"{path}: is (a symbolic link|not a regular file)"):
            JsonLines(path)
    with pytest.raises(UserError, match="runs: is a symbolic link"):
        EventWriter(tmp_path / "runs")
    assert theirs.read_text() == "theirs\n" and len(list(tmp_path.iterdir())) == 4


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
