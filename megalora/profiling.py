"""`--profile`: when each stage computed in a few steps of a run, as a Chrome trace and as a drawing beside the plan's.

Each rank marks the start and the end of its computes and of the phases of its clock: by the host clock on a CPU, by
events in the stream on a GPU, which nothing waits for until the steps are over. Times count from a meeting of all ranks
before each recorded step.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megalora.errors import UserError
from megalora.files import read_json, refuse_link, write_file
from megalora.models.spec import MLP, ModelSpec
from megalora.parallel.collectives import gather_objects
from megalora.parallel.mesh import Axis, Clock
from megalora.pipeline.actions import BACKWARD, FORWARD, Action
from megalora.pipeline.schedule import SCHEDULES
from megalora.pipeline.simulate import simulate
from megalora.planning.draw import Box, Panel, boxes_of, svg
from megalora.planning.plans import Plan
from megalora.planning.timing import LayerCosts

TRACE, DRAWING = "trace.json", "schedule.svg"
TRACE_BYTES = 1 << 30  # a trace has a line for each compute of each rank


@dataclass(frozen=True)
class TimedSpan:
    """Something that a rank did, in seconds from the start of its step. action: None for a phase of the clock."""

    name: str
    action: Action | None
    start: float
    end: float


class Profiler:
    """Records steps of this rank."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[tuple[str, Action | None, Any, Any]] | None = None  # of the step that is recorded
        self._zero: Any = None
        self._steps: list[list[TimedSpan]] = []

    @contextlib.contextmanager
    def step(self, recorded: bool, world: Axis) -> Iterator[None]:
        """Record the step that runs inside. Collective where it is recorded."""
        if not recorded:
            yield
            return
        self._synchronize()
        gather_objects(None, world)  # all ranks meet: their clocks start together
        self._zero, self._marks = self._mark(), []
        yield
        self._synchronize()
        marks = self._marks
        self._steps.append([TimedSpan(name, action, self._since(a), self._since(b)) for name, action, a, b in marks])
        self._marks = None

    def watch(self, action: Action) -> contextlib.AbstractContextManager:
        """Return a context that records the compute inside."""
        return contextlib.nullcontext() if self._marks is None else self._span(action.op, action)

    def clock(self, inner: Clock) -> Clock:
        """Return `inner`, and its phases recorded."""

        def timed(phase: str) -> contextlib.AbstractContextManager:
            if self._marks is None or phase in (FORWARD, BACKWARD):  # the computes are recorded by `watch`
                return inner(phase)
            return self._both(phase, inner)

        return timed

    def collect(self, world: Axis) -> list[list[list[TimedSpan]]]:
        """Return [rank][step] the spans of all ranks. Collective."""
        return gather_objects(self._steps, world)

    @contextlib.contextmanager
    def _span(self, name: str, action: Action | None) -> Iterator[None]:
        marks, start = self._marks, self._mark()
        try:
            yield
        finally:
            marks.append((name, action, start, self._mark()))

    @contextlib.contextmanager
    def _both(self, phase: str, inner: Clock) -> Iterator[None]:
        with inner(phase), self._span(phase, None):
            yield

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, mark: Any) -> float:
        return mark - self._zero if self._device.type != "cuda" else self._zero.elapsed_time(mark) / 1e3


def recorded_steps(steps: int, first_step: int, total_steps: int, graphs: bool) -> range:
    """Return which steps are recorded, counted from 0: the run's first, which readies much, is left out where it has
    more, and so is with graphs its second, which captures them.
    """
    begin = first_step + max(0, min(1 + graphs, total_steps - first_step - 1))
    return range(begin, min(begin + steps, total_steps))


# ---- what becomes of it ----


@dataclass(frozen=True)
class Measured:
    """Mean seconds of a microbatch in each part of the model (stage, or chunk of one), and what it was measured on.

    layers            [first, stop) of each part
    model             as `model_words` says it
    device            a name of megalora.planning.devices
    element           bytes of a value of the compute dtype
    base_format       of the frozen linears, one of choices.BASE_FORMATS
    context_parallel  ranks that shared the rows' tokens
    """

    layers: tuple[tuple[int, int], ...]
    forward: tuple[float, ...]
    recompute: tuple[float, ...]
    backward: tuple[float, ...]
    tp: int
    rows: int
    seq_length: int
    recompute_method: str | tuple[str, ...]
    sequence_parallel: bool
    model: str
    device: str
    element: int
    base_format: str = "dense"
    context_parallel: int = 1

    @property
    def totals(self) -> list[float]:
        return [sum(parts) for parts in zip(self.forward, self.recompute, self.backward, strict=True)]


def model_words(config: ModelSpec) -> str:
    """Return what decides how long a model computes, but for its depth."""
    sizes = {mixer.inner for mixer in config.mixers if isinstance(mixer, MLP)}
    inner = f"{' and '.join(map(str, sorted(sizes)))} inside, {config.num_attention_heads} heads"
    return f"{config.model_type} of hidden size {config.hidden_size}, {inner}, vocabulary {config.vocab_size}"


def write_profile(
    folder: str | Path, recorded: Sequence[Sequence[Sequence[TimedSpan]]], plan: Plan, model: str, device: str
) -> str:
    """Return the trace and the drawing of what Profiler.collect gave, in `folder`; returns a line that says so.

    plan           what the run was predicted to be
    model, device  as of Measured
    Raises UserError where the folder cannot be written.
    """
    folder, layout = Path(folder), plan.layout
    columns = [ranks_of_stage(stage, layout.dp, layout.tp) for stage in range(layout.pp)]
    last = [recorded[ranks[0]][-1] for ranks in columns]
    boxes = tuple(
        Box(stage, span.name, span.action.microbatch, span.action.chunk, span.start, span.end)
        for stage, spans in enumerate(last)
        for span in spans
        if span.action is not None
    )
    measured = _measured(recorded, columns, plan, model, device)
    whole = f"{layout.schedule}, {layout.pp} stages, {layout.microbatches} microbatches"
    real = max(box.end for box in boxes)
    simulated = _simulated(measured, plan)
    panels = [
        Panel(f"{whole}: measured, {real:.3g} s", layout.pp, boxes),
        Panel(f"simulated with the measured seconds of each part, {simulated.end:.3g} s", layout.pp, simulated.boxes),
        Panel(f"planned from counts, {plan.timeline.makespan:.3g} s", layout.pp, boxes_of(plan.timeline)),
    ]
    trace = {
        "traceEvents": list(_trace_events(recorded, layout.dp, layout.tp)),
        "displayTimeUnit": "ms",
        "otherData": {"measured": asdict(measured)},
    }
    try:
        refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / TRACE, json.dumps(trace).encode())
        write_file(folder / DRAWING, svg(panels).encode())
    except OSError as error:
        raise UserError(f"profile {folder} cannot be written ({error.strerror})", "make room or leave it out") from None
    return f"profile of {len(recorded[0])} steps: {folder / TRACE} (chrome://tracing, Perfetto), {folder / DRAWING}"


def read_profile(path: str | Path, config: ModelSpec, base_format: str) -> Measured:
    """Return the Measured of a trace.

    Raises UserError where the file is none, or of another model than that of `config`, or of a base in another format.
    """
    try:
        trace = read_json(Path(path), f"name a {TRACE} of a run with --profile", what="profile_file", most=TRACE_BYTES)
        fields = trace["otherData"]["measured"]
        fields = {
            name: tuple(map(_frozen, value)) if isinstance(value, list) else value for name, value in fields.items()
        }
        measured = Measured(**fields)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"profile_file {path} is not a {TRACE} of a run with --profile", "name one") from None
    theirs = f"{measured.model}, {measured.layers[-1][1]} layers"
    ours = f"{model_words(config)}, {config.num_hidden_layers} layers"
    if theirs != ours:
        raise UserError(f"profile_file {path} is of {theirs}; this model is {ours}", "profile a run of this model")
    if measured.base_format != base_format:
        raise UserError(
            f"profile_file {path} is of a run whose base was in {measured.base_format}, not in {base_format}",
            f"give --base_format {measured.base_format}, or profile a run with the base in {base_format}",
        )
    return measured


def measured_costs(counted: LayerCosts, measured: Measured) -> LayerCosts:
    """Return `counted`, made to add up to what was measured.

    Counts say how layers compare, measured seconds how long parts took: the layers are scaled by the parts without the
    head, and the head is what the last part took besides. From a single part both are scaled alike.
    """
    layers = [sum(counted.layers[a:b]) for a, b in measured.layers]
    totals = measured.totals
    if len(layers) == 1:
        factor = totals[0] / (layers[0] + counted.first + counted.last)
        return LayerCosts(tuple(factor * x for x in counted.layers), factor * counted.first, factor * counted.last)
    factor = sum(totals[:-1]) / (sum(layers[:-1]) + counted.first)
    last = max(0.0, totals[-1] - factor * layers[-1])
    return LayerCosts(tuple(factor * x for x in counted.layers), factor * counted.first, last)


def ranks_of_stage(stage: int, dp: int, tp: int) -> range:
    """Return the ranks of a stage (see megalora.parallel.mesh.layout)."""
    return range(stage * dp * tp, (stage + 1) * dp * tp)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _measured(recorded: Sequence, columns: Sequence[range], plan: Plan, model: str, device: str) -> Measured:
    layout = plan.layout
    parts = layout.pp * layout.chunks

    def mean(part: int, op: str) -> float:
        stage, chunk = part % layout.pp, part // layout.pp
        seconds = [
            span.end - span.start
            for rank in columns[stage]
            for spans in recorded[rank]
            for span in spans
            if span.action is not None and (span.action.op, span.action.chunk) == (op, chunk)
        ]
        return sum(seconds) / len(seconds) if seconds else 0.0

    chunks = [plan.stages[part % layout.pp].chunks[part // layout.pp] for part in range(parts)]
    again = SCHEDULES[layout.schedule].recomputes
    return Measured(
        tuple((chunk.start, chunk.stop) for chunk in chunks),
        tuple(mean(part, FORWARD) for part in range(parts)),
        tuple(mean(part, "recompute") if again(part % layout.pp, layout.pp) else 0.0 for part in range(parts)),
        tuple(mean(part, BACKWARD) for part in range(parts)),
        layout.tp,
        layout.work.rows,
        layout.work.seq_length,
        layout.work.recompute,
        layout.work.sequence_parallel,
        model,
        device,
        layout.work.element,
        layout.work.base_format,
        layout.work.context_parallel,
    )


def _simulated(measured: Measured, plan: Plan) -> Panel:
    layout = plan.layout
    seconds = {FORWARD: measured.forward, "recompute": measured.recompute, BACKWARD: measured.backward}
    floor = next((i for i, backward in enumerate(measured.backward) if backward), len(measured.backward))
    programme = SCHEDULES[layout.schedule].programme(layout.pp, layout.microbatches, floor, layout.chunks)

    def of(stage: int, action: Action) -> float:
        return seconds[action.op][action.chunk * layout.pp + stage] if action.op in seconds else 0.0

    return Panel("", layout.pp, boxes_of(simulate(programme, of)))


def _trace_events(recorded: Sequence, dp: int, tp: int) -> Iterator[dict[str, Any]]:
    """Yield Chrome's trace event format: complete events in microseconds, one process a rank; steps one after another.
    """
    for rank in range(len(recorded)):
        stage, data, tensor = rank // (dp * tp), rank // tp % dp, rank % tp
        name = f"rank {rank}: stage {stage}, data {data}, tensor {tensor}"
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
    begin = 0.0
    for step in range(len(recorded[0])):
        for rank, steps in enumerate(recorded):
            for span in steps[step]:
                about = {"step": step}
                if span.action is not None:
                    about |= {"microbatch": span.action.microbatch, "chunk": span.action.chunk}
                yield {
                    "ph": "X",
                    "name": span.name,
                    "cat": "phase" if span.action is None else "compute",
                    "pid": rank,
                    "tid": 0,
                    "ts": 1e6 * (begin + span.start),
                    "dur": 1e6 * (span.end - span.start),
                    "args": about,
                }
        begin += max((span.end for steps in recorded for span in steps[step]), default=0.0)
