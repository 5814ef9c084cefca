"""The figures of pipelines that sleep, with generous bounds: `benchmarks/pipeline_timing.py` has the true ones."""

from sleeping import Pipeline, measure
from spawn import spawn

from megalora.pipeline.schedule import SCHEDULES

LAYER = 0.005  # four layers a stage: 20 ms


def timed(*pipelines: Pipeline) -> list[float]:
    return spawn(measure, 4, list(pipelines), 3)[0]


def test_a_step_takes_what_the_simulator_says():
    pipelines = [Pipeline(name, 4, chunks=1 + s.chunked, layer=LAYER) for name, s in SCHEDULES.items()]
    for pipeline, seconds in zip(pipelines, timed(*pipelines), strict=True):
        assert 0.99 < seconds / pipeline.predicted().makespan < 1.5, (pipeline, seconds)


def test_the_floor_and_late_messages():
    whole = Pipeline(layer=LAYER, lowest=8, floor=False)
    cut = Pipeline(layer=LAYER, lowest=8, partition_method="cost")
    late, eager = (Pipeline(name, 8, layer=LAYER, latency=0.016) for name in ("1f1b", "eager_1f1b"))
    assert [len(part) for part in cut.parts()] == [6, 4, 3, 3] and cut.first_trained() == 1
    assert cut.predicted().makespan < 0.78 * whole.predicted().makespan
    times = timed(whole, cut, late, eager)
    assert times[1] < 0.9 * times[0]
    assert times[3] < times[2] and times[2] < 1.5 * late.predicted().makespan
