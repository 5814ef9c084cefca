"""Pipelines of four processes whose layers sleep: measured against the simulator, and what each means is worth.

    python benchmarks/pipeline_timing.py [schedules] [interleaving] [floor] [overlap]

The processes talk over gloo. Every figure is of the best of REPEATS steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from sleeping import Pipeline, measure
from spawn import spawn

from megalora.pipeline.schedule import SCHEDULES

REPEATS = 5


def timed(pipelines: list[Pipeline]) -> list[float]:
    return spawn(measure, 4, pipelines, REPEATS, timeout=300)[0]


def schedules() -> None:
    """Forward and backward of a chunk sleep 20 ms."""
    pipelines = [
        Pipeline(name, m, chunks=2, layer=0.01) if schedule.chunked else Pipeline(name, m, layer=0.005)
        for name, schedule in SCHEDULES.items()
        for m in (4, 8, 16)
    ]
    print("| schedule | m | predicted ms | measured ms | off |\n|---|---|---|---|---|")
    for pipeline, seconds in zip(pipelines, timed(pipelines), strict=True):
        predicted = pipeline.predicted().makespan
        times = f"{predicted * 1e3:.0f} | {seconds * 1e3:.1f} | {seconds / predicted - 1:.1%}"
        print(f"| {pipeline.schedule} | {pipeline.microbatches} | {times} |")


def interleaving() -> None:
    """The bubble as Narayanan et al. 2021 count it: time beyond that of the work alone. A chunk sleeps 40 ms."""
    pipelines = [Pipeline(layer=0.02), Pipeline("interleaved_1f1b", chunks=2, layer=0.02)]
    work = [pipeline.predicted().busy[0] for pipeline in pipelines]
    plain, interleaved = (s - w for s, w in zip(timed(pipelines), work, strict=True))
    ratio = f"{interleaved / plain:.3f}x"
    print(f"bubble, m 8: 1f1b {plain * 1e3:.0f} ms, interleaved v=2 {interleaved * 1e3:.0f} ms: {ratio}")


def floor() -> None:
    """Adapters in the upper half of 16 layers, m 8."""
    whole = Pipeline(layer=0.005, lowest=8, floor=False)
    cut = Pipeline(layer=0.005, lowest=8, partition_method="cost")
    without, with_floor = timed([whole, cut])
    layers = " ".join(str(len(part)) for part in cut.parts())
    print(f"step without floor {without * 1e3:.0f} ms, with it and layers {layers} {with_floor * 1e3:.0f} ms: "
          f"{with_floor / without:.3f}x")  # fmt: skip


def overlap() -> None:
    """Forward and backward 20 ms, 2 ms more for every message, m 16."""
    names = ("1f1b", "eager_1f1b")
    seconds = timed([Pipeline(name, 16, layer=0.005, latency=late) for name in names for late in (0.0, 0.002)])
    for i, name in enumerate(names):
        at_once, late = seconds[2 * i : 2 * i + 2]
        times = f"{at_once * 1e3:.0f} ms, with 2 ms a message {late * 1e3:.0f} ms"
        print(f"{name}: {times}: loses {late / at_once - 1:.1%}")


PARTS = {part.__name__: part for part in (schedules, interleaving, floor, overlap)}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        print(f"{name}: {PARTS[name].__doc__}")
        PARTS[name]()
        print()
