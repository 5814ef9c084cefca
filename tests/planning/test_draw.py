"""Drawings: every compute is a box of its row, at its time, and the file is sound XML."""

from xml.etree import ElementTree

import pytest

from megalora.pipeline.actions import BACKWARD, COMPUTE, FORWARD, RECOMPUTE, SENDS
from megalora.pipeline.schedule import SCHEDULES
from megalora.pipeline.simulate import simulate
from megalora.planning.draw import Panel, boxes_of, svg

SVG = "{http://www.w3.org/2000/svg}"


def timeline(name: str, stages: int = 4, microbatches: int = 8, chunks: int = 1):
    programme = SCHEDULES[name].programme(stages, microbatches, 0, chunks)
    return simulate(programme, lambda stage, action: 0.0 if action.op in SENDS else 1.0 + (action.op == BACKWARD))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_compute_of_any_schedule_is_drawn(name):
    chunks = 2 if SCHEDULES[name].chunked else 1
    line = timeline(name, chunks=chunks)
    boxes = boxes_of(line)
    root = ElementTree.fromstring(svg([Panel(f"{name} <&>", 4, boxes)]))
    drawn = [title.text for title in root.iter(f"{SVG}title")]
    assert len(drawn) == len(boxes) == sum(event.action.op in COMPUTE for event in line.events)
    assert sum(text.startswith(FORWARD) for text in drawn) == 4 * 8 * chunks
    assert any("chunk 1" in text for text in drawn) == (chunks == 2)
    rows = {rect.get("y") for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None}
    assert len(rows) == 4


def test_what_is_computed_again_is_a_box_of_its_own():
    line = timeline("1f1b")
    boxes = boxes_of(line, lambda stage, action: 0.5)
    again = [box for box in boxes if box.op == RECOMPUTE]
    assert len(again) == 32 and all(box.end - box.start == 0.5 for box in again)
    behind = {(box.stage, box.microbatch): box.start for box in boxes if box.op == BACKWARD}
    assert all(behind[box.stage, box.microbatch] == box.end for box in again)
    assert "#edc948" in svg([Panel("1f1b", 4, boxes)])


def test_panels_share_one_scale():
    short, long = boxes_of(timeline("1f1b", microbatches=4)), boxes_of(timeline("1f1b", microbatches=16))
    root = ElementTree.fromstring(svg([Panel("short", 4, short), Panel("long", 4, long)]))
    widths = [
        float(r.get("width"))
        for r in root.iter(f"{SVG}rect")
        if (t := r.find(f"{SVG}title")) is not None and t.text.startswith(FORWARD)
    ]
    assert max(widths) - min(widths) < 0.02
    assert all(float(r.get("x", 0)) + float(r.get("width")) <= 1240 for r in root.iter(f"{SVG}rect"))
