"""Curves of files that grow, are rewritten, are damaged, or are large."""

from __future__ import annotations

import json
import math
import os

import pytest

from megalora.runs import series
from megalora.runs.series import Columns, GrowingFile, thinned


def line(step, **more):
    return json.dumps({"step": step, "loss": 1 / step} | more) + "\n"


def values(file, name="loss"):
    return dict(zip(*thinned(file.columns, name, 0, math.inf, 10**6), strict=True))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_only_what_is_new_is_read(path, monkeypatch):
    file = GrowingFile(path)
    file.look()
    assert not file.complete and file.version == 0, "it is not there yet"
    path.write_text(line(1) + line(2))
    file.look()
    assert values(file) == {1: 1, 2: 0.5} and file.complete
    version, parse = file.version, series._records
    seen = []
    monkeypatch.setattr(series, "_records", lambda lines: parse(seen.append(lines) or lines))
    file.look()
    assert file.version == version and not seen
    with path.open("a") as more:
        more.write(line(3) + line(4)[:9])
        more.flush()
        file.look()
        assert values(file) == {1: 1, 2: 0.5, 3: 1 / 3}, "half a line waits"
        more.write(line(4)[9:])
    file.look()
    assert values(file)[4] == 0.25 and [len(lines) for lines in seen] == [1, 1]
    assert file.version > version and file.columns.last_step == 4


def test_a_rewritten_file_is_read_anew_and_a_moved_one_goes_on(path, tmp_path):
    file = GrowingFile(path)
    path.write_text(line(1) + line(2) + line(3))
    file.look()
    aside = tmp_path / "aside"
    aside.write_text(line(1) + line(2) + line(3) + line(4))  # as a run that is resumed copies what it keeps
    os.replace(aside, path)
    file.look()
    assert list(values(file)) == [1, 2, 3, 4]
    path.write_text(line(1, loss=9.0))
    file.look()
    assert values(file) == {1: 9.0}
    path.unlink()
    file.look()
    assert not file.complete


def test_what_is_no_line_of_a_run_is_left_out(path):
    bad = ["", "{", "[1]", "3", '{"step": -1, "loss": 1}', '{"step": true, "loss": 2}', '{"step": 1e999}', "[" * 50_000]
    huge = '{"step": 5, "loss": 1' + "0" * 400 + "}"
    good = '{"step": 6, "loss": null, "text": "x", "ok": true, "phases": {"forward": 0.5, "deep": {"x": 1}}}'
    path.write_text("\n".join([*bad, huge, '{"step": 7, "loss": NaN}', good, line(8)]))
    file = GrowingFile(path)
    file.look()
    assert values(file) == {8: 0.125} and values(file, "phases/forward") == {6: 0.5}
    assert sorted(file.columns.steps) == ["loss", "phases/forward"]
    path.unlink()
    os.mkfifo(path)
    file.look()
    assert not file.complete, "a pipe holds nothing up"


def test_what_comes_after_a_sample_is_in_it_at_once(path, monkeypatch):
    monkeypatch.setattr(series, "_PIECE", 1000)
    path.write_text("".join(line(step) for step in range(1, 501)))
    file = GrowingFile(path)
    file.look()
    before, version = values(file), file.version
    with path.open("a") as out:
        out.write(line(501) + line(502)[:-5])
    file.look()
    assert not file.complete and values(file) == before | {501: 1 / 501} and file.version > version
    with path.open("a") as out:
        out.write(line(502)[-5:])
    file.look()
    assert values(file) == before | {501: 1 / 501, 502: 1 / 502}
    while file.read_on():
        pass
    assert file.complete and values(file) == {step: 1 / step for step in range(1, 503)}


def test_a_sample_of_a_run_that_starts_over_is_forgotten(path, monkeypatch):
    monkeypatch.setattr(series, "_PIECE", 1000)
    path.write_text("".join(line(step) for step in range(1, 501)))
    file = GrowingFile(path)
    file.look()
    other = path.with_suffix(".new")
    other.write_text("".join(line(step, loss=7.0) for step in range(1, 201)))
    os.replace(other, path)
    file.look()
    with path.open("a") as out:
        out.write("".join(line(step, loss=7.0) for step in range(201, 601)))
    file.look()
    steps, found = thinned(file.columns, "loss", 0, math.inf, 10**6)
    assert set(found) == {7.0} and steps == sorted(steps)


def test_of_a_large_file_a_sample_comes_first(path, monkeypatch):
    monkeypatch.setattr(series, "_PIECE", 1000)
    monkeypatch.setattr(series, "SAMPLE_LINES", 20)
    path.write_text("".join(line(step) for step in range(1, 501)))
    file = GrowingFile(path)
    file.look()
    sampled = values(file)
    assert not file.complete and 15 <= len(sampled) and 1 in sampled and file.columns.last_step == 500
    assert all(value == 1 / step for step, value in sampled.items()) and list(sampled) == sorted(sampled)
    pieces = 0
    while file.read_on():
        pieces += 1
        assert values(file) == sampled or file.complete
    assert pieces > 5 and file.complete and values(file) == {step: 1 / step for step in range(1, 501)}
    with path.open("a") as more:
        more.write(line(501))
    file.look()
    assert len(values(file)) == 501


def test_thinning_keeps_every_spike():
    columns = Columns()
    for step in range(1, 10_001):
        columns.add({"step": step, "loss": {5000: 99.0, 7001: -99.0}.get(step, float(step % 7))})
    steps, found = thinned(columns, "loss", 0, math.inf, 200)
    assert len(steps) <= 204 and steps == sorted(set(steps)) and {5000, 7001, 1, 10_000} <= set(steps)
    assert all(value == {5000: 99.0, 7001: -99.0}.get(step, step % 7) for step, value in zip(steps, found, strict=True))
    near, exact = thinned(columns, "loss", 4995, 5005, 200)
    assert near == list(range(4995, 5006)) and exact[5] == 99.0
    assert thinned(columns, "nothing", 0, 1, 10) == ([], [])


def test_a_stranger_cannot_make_it_keep_without_end():
    columns = Columns()
    columns.add({"step": 1} | {f"x{i}": i for i in range(1000)})
    assert len(columns.steps) == series.MOST_FIELDS
