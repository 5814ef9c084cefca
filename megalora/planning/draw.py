"""Timelines of pipeline schedules as SVG: one row a stage, time to the right, every panel on the same scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from megalora.pipeline.actions import BACKWARD, COMPUTE, FORWARD, RECOMPUTE, Action
from megalora.pipeline.simulate import Timeline

_COLORS = {FORWARD: "#4e79a7", BACKWARD: "#59a14f", RECOMPUTE: "#edc948"}
_WAIT = "#e6e6e6"
_LEFT, _RIGHT, _TOP, _ROW, _GAP, _WIDTH = 80, 20, 44, 26, 6, 1240
_LEAST_NUMBERED = 13  # pixels of a box that has room for its microbatch's number
_LEGEND = ((FORWARD, _COLORS[FORWARD]), (BACKWARD, _COLORS[BACKWARD]), (RECOMPUTE, _COLORS[RECOMPUTE]), ("wait", _WAIT))


@dataclass(frozen=True)
class Box:
    """One compute of a stage, in seconds from the start of the step."""

    stage: int
    op: str
    microbatch: int
    chunk: int
    start: float
    end: float


@dataclass(frozen=True)
class Panel:
    """One timeline with a title."""

    title: str
    stages: int
    boxes: tuple[Box, ...]

    @property
    def end(self) -> float:
        return max((box.end for box in self.boxes), default=0.0)


def boxes_of(timeline: Timeline, again: Callable[[int, Action], float] = lambda stage, action: 0.0) -> tuple[Box, ...]:
    """Return the computes of a timeline. again(stage, action): seconds at the start of a backward that compute again
    what was not kept; they become a box of their own.
    """
    boxes = []
    for event in timeline.events:
        action = event.action
        if action.op not in COMPUTE:
            continue
        start = event.start
        recomputed = again(event.stage, action) if action.op == BACKWARD else 0.0
        if recomputed:
            boxes.append(Box(event.stage, RECOMPUTE, action.microbatch, action.chunk, start, start + recomputed))
            start += recomputed
        boxes.append(Box(event.stage, action.op, action.microbatch, action.chunk, start, event.end))
    return tuple(boxes)


def svg(panels: Sequence[Panel]) -> str:
    """Return the panels one below the other, as an SVG document."""
    longest = max(panel.end for panel in panels) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    heights = [_TOP + panel.stages * _ROW + 34 for panel in panels]
    height = sum(heights) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    top = 0
    for panel, tall in zip(panels, heights, strict=True):
        parts += _panel(panel, top, scale, longest)
        top += tall
    parts += _legend(top + 10)
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, top: int, scale: float, longest: float) -> Iterable[str]:
    yield f'<text x="{_LEFT}" y="{top + 26}" font-size="15">{escape(panel.title)}</text>'
    rows = top + _TOP
    for stage in range(panel.stages):
        y = rows + stage * _ROW
        yield f'<text x="{_LEFT - 10}" y="{y + 15}" text-anchor="end">stage {stage}</text>'
        yield _rect(_LEFT, y, panel.end * scale, _WAIT)
    for box in panel.boxes:
        x, y, width = _LEFT + box.start * scale, rows + box.stage * _ROW, (box.end - box.start) * scale
        what = f"{box.op} of microbatch {box.microbatch}" + (f", chunk {box.chunk}" if box.chunk else "")
        about = f"<title>{what}: {_seconds(box.start)} to {_seconds(box.end)}</title>"
        # Further chunks of a stage are paler.
        yield _rect(x, y, width, _COLORS[box.op], about, 1.0 / (1 + 0.45 * box.chunk))
        if width >= _LEAST_NUMBERED:
            dark = box.op == RECOMPUTE or box.chunk
            yield (
                f'<text x="{x + width / 2:.1f}" y="{y + 15}" text-anchor="middle" font-size="11" '
                f'fill="{"#222222" if dark else "#ffffff"}" pointer-events="none">{box.microbatch}</text>'
            )
    bottom = rows + panel.stages * _ROW
    for tick in _ticks(longest):
        x = _LEFT + tick * scale
        yield f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}" stroke="#555555"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle" font-size="11">{_seconds(tick)}</text>'


def _rect(x: float, y: float, width: float, fill: str, inside: str = "", opacity: float = 1.0) -> str:
    edge = ' stroke="#ffffff" stroke-width="0.5"' if fill != _WAIT else ""
    faint = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{max(width, 0.2):.2f}" height="{_ROW - _GAP}" fill="{fill}"{faint}{edge}>'
        f"{inside}</rect>"
    )


def _legend(top: int) -> Iterable[str]:
    x = _LEFT
    for name, color in _LEGEND:
        yield f'<rect x="{x}" y="{top}" width="14" height="14" fill="{color}"/>'
        yield f'<text x="{x + 20}" y="{top + 12}">{name}</text>'
        x += 110


def _ticks(longest: float) -> list[float]:
    """Return about eight round numbers from 0 on."""
    step = 10.0**-12
    while longest / step > 8:
        step *= 2 if f"{step:e}"[0] in "15" else 2.5
    return [i * step for i in range(int(longest / step) + 1)]


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 or value == 0 else f"{value * 1e3:.3g} ms"
