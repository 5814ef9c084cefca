"""The layouts that a model can be trained in on given GPUs: what each needs and takes, and which is the fastest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from megalora.adapters.config import ResolvedLora
from megalora.errors import UserError
from megalora.models.config import check_context, check_layout
from megalora.models.spec import ModelSpec
from megalora.pipeline.actions import FORWARD, RECOMPUTE, SENDS, Action
from megalora.pipeline.schedule import SCHEDULES, Schedule
from megalora.pipeline.simulate import simulate
from megalora.planning.devices import Device, device_of
from megalora.planning.fitting import Budget, Fit, Fitting, StageUse
from megalora.planning.nodes import Workload, chunk_nodes
from megalora.planning.plans import Cluster, Layout, Plan, Sizes, StagePlan, TooLarge, Wanted
from megalora.planning.shapes import Shape, shape_of
from megalora.planning.timing import LayerCosts, Seconds, cut_layers, layer_costs, node_seconds, reduce_seconds

# Over the adapters' float32 elements: zeroing, the norm, clipping (2), AdamW (7), the copies in the compute dtype (2).
_OPTIMIZER_PASSES = 13
_CHUNKS = (2, 4)  # of a stage, that are tried under an interleaved schedule


class Planner:
    """Finds and reckons layouts of one model with its adapters on one cluster."""

    def __init__(self, config: ModelSpec, lora: ResolvedLora, cluster: Cluster, device_type: str = "cuda"):
        self._config, self._lora, self._cluster, self._device_type = config, lora, cluster, device_type
        self._shapes: dict[int, Shape] = {}
        self._costs: dict[tuple, LayerCosts] = {}
        self._chunks: dict[tuple, Seconds] = {}
        self._fits: dict[tuple, Fit] = {}
        self._cuts: dict[tuple, list[range]] = {}

    def search(self, wanted: Wanted) -> tuple[list[Plan], list[TooLarge]]:
        """Return the fastest plan of each tensor x pipeline x context size, fastest first, and the sizes of which none
        fits.

        Raises UserError where the cluster and what is wanted allow no layout at all.
        """
        if wanted.cp is None:
            try:
                plans, too_large = self.search(replace(wanted, cp=1))
                if plans:
                    return plans, too_large
            except UserError:
                pass  # too few rows for so many data-parallel ranks, say
        reasons: list[str] = []
        found = [self.fastest(sizes, wanted) for sizes in self.sizes(wanted, reasons)]
        if not found:
            said = "; ".join(dict.fromkeys(reasons))
            raise UserError(f"no layout of {self._cluster.gpus} GPUs: {said}", "leave sizes of the layout free")
        plans = [one for one in found if isinstance(one, Plan)]
        too_large = [one for one in found if isinstance(one, TooLarge)]
        return sorted(plans, key=_rank), sorted(too_large, key=lambda found: found.memory.total)

    def fastest(self, sizes: Sizes, wanted: Wanted) -> Plan | TooLarge:
        """Return the fastest plan of these sizes, one of `sizes`, or what needs the least where none fits."""
        fitting, least = [], None
        for layout in self._layouts(sizes, wanted):
            stages = self.stages(layout, wanted)
            fullest = max(range(layout.pp), key=lambda s: stages[s].memory.total)
            found = TooLarge(layout, fullest, stages[fullest].memory)
            if found.memory.total <= self._cluster.usable:
                fitting.append((layout, stages))
            elif least is None or found.memory.total < least.memory.total:
                least = found
        if fitting:
            return self._fastest(fitting)
        assert least is not None, "sizes have a layout"
        return least

    def stages(self, layout: Layout, wanted: Wanted) -> tuple[StagePlan, ...]:
        """Return what each stage of the layout holds, needs and takes."""
        shape, schedule = self._shape(layout.tp), SCHEDULES[layout.schedule]
        costs = self._layer_costs(layout)
        parts = self._parts(layout, wanted, costs)
        floor = next((i for i, part in enumerate(parts) if shape.lowest < part.stop), len(parts))
        shares = costs.shares(parts)
        stages = []
        for s in range(layout.pp):
            chunks = tuple(parts[s :: layout.pp])
            peak = schedule.peak(s, layout.pp, layout.microbatches, floor, layout.chunks)
            first, last = s == 0, s == layout.pp - 1
            fit = self._fit(layout, StageUse(shape, chunks, first, last, max(1, peak.activations), peak.inputs))
            seconds = tuple(
                self._seconds(layout, fit.work, chunk, first and i == 0, last and i == layout.chunks - 1)
                for i, chunk in enumerate(chunks)
            )
            words = fit.words([i for chunk in chunks for i in chunk])
            stages.append(StagePlan(chunks, fit.memory, seconds, sum(shares[s :: layout.pp]), words, fit.host))
        return tuple(stages)

    def plan(self, layout: Layout, stages: Sequence[StagePlan]) -> Plan:
        """Run the layout's schedule in the simulator."""
        shape, schedule, device = self._shape(layout.tp), SCHEDULES[layout.schedule], self._cluster.device
        parts = [stages[i % layout.pp].chunks[i // layout.pp] for i in range(layout.pp * layout.chunks)]
        floor = next((i for i, part in enumerate(parts) if shape.lowest < part.stop), len(parts))
        message = layout.work.tokens * shape.hidden * layout.work.element
        message //= layout.tp if layout.work.sequence_parallel else 1
        line = message / self._cluster.speed(layout.tp * layout.dp, 2)

        def seconds(stage: int, action: Action) -> float:
            return line if action.op in SENDS else compute_seconds(stages[stage].seconds[action.chunk], action)

        programme = schedule.programme(layout.pp, layout.microbatches, floor, layout.chunks)
        timeline = simulate(programme, seconds, device.latency)
        return Plan(layout, tuple(stages), timeline, timeline.makespan + self._update_seconds(layout, stages))

    # ---- what is tried ----

    def sizes(self, wanted: Wanted, reasons: list[str]) -> Iterator[Sizes]:
        """Yield the tensor, pipeline and context sizes that have a layout; why others have none is added to `reasons`.
        """
        gpus, per_node = self._cluster.gpus, self._cluster.gpus_per_node
        for tp in [wanted.tp] if wanted.tp else _divisors(min(per_node, gpus)):
            if gpus % tp:
                reasons.append(f"tensor_parallel_size ({tp}) does not divide gpus ({gpus})")
                continue
            for pp in [wanted.pp] if wanted.pp else _divisors(gpus // tp):
                if gpus // tp % pp:
                    sizes = f"tensor_parallel_size ({tp}) * pipeline_parallel_size ({pp})"
                    reasons.append(f"{sizes} does not divide gpus ({gpus})")
                    continue
                uneven = wanted.uneven_heads and self._config.num_attention_heads % tp > 0
                try:
                    check_layout(self._config, tp, pp, uneven)
                except UserError as error:
                    reasons.append(str(error))
                    continue
                yield from self._contexts(tp, pp, wanted, reasons)

    def _contexts(self, tp: int, pp: int, wanted: Wanted, reasons: list[str]) -> Iterator[Sizes]:
        replicas = self._cluster.gpus // tp // pp
        for cp in [wanted.cp] if wanted.cp else _divisors(replicas):
            if replicas % cp:
                reasons.append(
                    f"context_parallel_size ({cp}) does not divide the {replicas} GPUs that each stage's shard has"
                )
                continue
            try:
                check_context(self._config, cp, self._lora.config.task_type)
            except UserError as error:
                reasons.append(str(error))
                return
            if any(True for _ in self._layouts((tp, pp, cp), wanted)):
                yield tp, pp, cp
                continue
            rows = "the rows" if wanted.step_rows is None else f"the {wanted.step_rows} rows"
            cut = f", or not cut over {tp} tensor-parallel ranks" if wanted.sequence_parallel else ""
            cut += f", or not over {cp} context-parallel ones" if cp > 1 else ""
            reasons.append(
                f"{rows} of a step cannot be dealt to {replicas // cp} data-parallel ranks in equal "
                f"microbatches{cut}, or schedule and layers do not fit {pp} stages"
            )

    def _layouts(self, sizes: Sizes, wanted: Wanted) -> Iterator[Layout]:
        tp, pp, cp = sizes
        dp = self._cluster.gpus // (tp * pp)
        for rows, microbatches in _microbatches(dp // cp, wanted):
            tokens = rows * wanted.work.seq_length
            divides = tp > 1 and tokens % (tp * cp) == 0
            sequence_parallel = divides if wanted.sequence_parallel is None else wanted.sequence_parallel
            if sequence_parallel and not divides or tokens % cp:
                continue
            for schedule, chunks in self._schedules(pp, wanted):
                recompute = wanted.recompute or "auto"
                if recompute == "full" and schedule.recomputes(0, max(2, pp)):
                    continue  # layers would be computed three times
                auto = recompute == "auto"
                work = replace(wanted.work, rows=rows, sequence_parallel=sequence_parallel, context_parallel=cp)
                work = replace(work, recompute="none" if auto else recompute)
                layout = Layout(tp, pp, dp, schedule.name, chunks, microbatches, work, auto=auto)
                yield replace(layout, recompute_layers=wanted.recompute_layers, offloads=wanted.offloads)

    def _schedules(self, pp: int, wanted: Wanted) -> Iterator[tuple[Schedule, int]]:
        for schedule in [SCHEDULES[wanted.schedule]] if wanted.schedule else SCHEDULES.values():
            if pp == 1 and wanted.schedule is None and schedule.name != "1f1b":
                continue
            if not schedule.chunked:
                if wanted.chunks in (None, 1):
                    yield schedule, 1
                continue
            for chunks in [wanted.chunks] if wanted.chunks else _CHUNKS:
                if pp > 1 and chunks > 1 and pp * chunks <= self._config.num_hidden_layers:
                    yield schedule, chunks

    # ---- what they take ----

    def _fastest(self, fitting: Sequence[tuple[Layout, tuple[StagePlan, ...]]]) -> Plan:
        """Simulate in the order of what each could give at best, until no other can be faster."""
        bounds = [
            (layout.tokens / (_least_seconds(layout, stages) + self._update_seconds(layout, stages)), layout, stages)
            for layout, stages in fitting
        ]
        best = None
        for bound, layout, stages in sorted(bounds, key=lambda one: -one[0]):
            if best is not None and bound < best.tokens_per_second:
                break
            plan = self.plan(layout, stages)
            if best is None or _rank(plan) < _rank(best):
                best = plan
        return best

    def _update_seconds(self, layout: Layout, stages: Sequence[StagePlan]) -> float:
        """Return the seconds a step of reducing the adapters' gradients over data parallel, and of the optimizer."""
        device, shape = self._cluster.device, self._shape(layout.tp)
        elements = max(
            shape.trained(stage.chunks, first=s == 0, last=s == layout.pp - 1) for s, stage in enumerate(stages)
        )
        speed = self._cluster.speed(layout.tp, layout.dp)
        return reduce_seconds(4 * elements, layout.dp, speed, device) + 4 * elements * _OPTIMIZER_PASSES / device.memory

    def _shape(self, tp: int) -> Shape:
        if tp not in self._shapes:
            self._shapes[tp] = shape_of(self._config, self._lora, tp, self._device_type)
        return self._shapes[tp]

    def _layer_costs(self, layout: Layout) -> LayerCosts:
        key = layout.pace
        if key not in self._costs:
            self._costs[key] = layer_costs(self._shape(layout.tp), layout.work, self._device(layout))
        return self._costs[key]

    def _device(self, layout: Layout) -> Device:
        """Return the device as one rank of the layout finds it."""
        device = self._cluster.device.with_graphs() if layout.graphs else self._cluster.device
        device = replace(device, context=self._cluster.speed(layout.tp, layout.cp) if layout.cp > 1 else 0.0)
        if min(self._cluster.gpus, self._cluster.gpus_per_node) % layout.tp:  # some groups are in several nodes
            return device.across_nodes()
        return replace(device, overlaps=False) if layout.tp_comm_overlap is False else device

    def _parts(self, layout: Layout, wanted: Wanted, costs: LayerCosts) -> list[range]:
        key = layout.pace, layout.pp * layout.chunks, wanted.partition_method
        if key not in self._cuts:
            method, parts, custom = wanted.partition_method, layout.pp * layout.chunks, wanted.custom_partition
            self._cuts[key] = cut_layers(self._config, method, parts, costs, custom)
        return self._cuts[key]

    def _fit(self, layout: Layout, stage: StageUse) -> Fit:
        layers, offloads = layout.recompute_layers, layout.offloads
        of_stage = stage.chunks, stage.first, stage.last, stage.in_flight, stage.inputs
        key = layout.tp, layout.work, layout.auto, layers, offloads, *of_stage
        if key not in self._fits:
            chosen = layout.auto or layers is not None or bool(offloads)
            budget = Budget(self._cluster.usable, self._cluster.host) if chosen else None
            fitting = Fitting(layout.recompute if chosen else None, budget, layers, offloads)
            self._fits[key] = fitting.choose(stage, layout.work)
        return self._fits[key]

    def _seconds(self, layout: Layout, work: Workload, chunk: range, first: bool, last: bool) -> Seconds:
        key = layout.pace, work, chunk, first, last
        if key not in self._chunks:
            nodes = chunk_nodes(self._shape(layout.tp), chunk, work, first=first, last=last)
            self._chunks[key] = node_seconds(nodes, self._device(layout), work.element, layout.tp)
        return self._chunks[key]


def predicted(
    config: ModelSpec, lora: ResolvedLora, layout: Layout, parts: Sequence[range], device: torch.device
) -> Plan:
    """Return the plan of a run that is cut into `parts` and runs on this process's device and its like."""
    ranks = layout.tp * layout.pp * layout.dp
    planner = Planner(config, lora, Cluster(ranks, min(ranks, 8), 0, device_of(device)), device.type)
    wanted = Wanted(layout.work, None, partition_method="custom", custom_partition=tuple(map(len, parts)))
    return planner.plan(layout, planner.stages(layout, wanted))


def compute_seconds(chunk: Seconds, action: Action) -> float:
    """Return the seconds of one compute of a microbatch in a chunk; a schedule's own recompute runs the whole forward
    again.
    """
    return chunk.forward if action.op in (FORWARD, RECOMPUTE) else chunk.recompute + chunk.backward


def _least_seconds(layout: Layout, stages: Sequence[StagePlan]) -> float:
    """Return what no schedule is faster than: a stage waits for the first forward before it, works, and its last
    gradient goes on.
    """
    again = SCHEDULES[layout.schedule].recomputes
    before, least = 0.0, 0.0
    for s, stage in enumerate(stages):
        work = stage.microbatch + (sum(one.forward for one in stage.seconds) if again(s, layout.pp) else 0.0)
        least = max(least, before + layout.microbatches * work)
        before += stage.seconds[0].forward + stage.seconds[0].backward
    return least


def _rank(plan: Plan) -> tuple:
    """Return the order of plans: speeds that differ by less than half a percent count as one: then the plan that needs
    less goes first.
    """
    return -float(f"{plan.tokens_per_second:.3g}"), plan.memory


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _microbatches(dp: int, wanted: Wanted) -> Iterator[tuple[int, int]]:
    """Yield (rows of a microbatch, microbatches of a step) of a data-parallel rank."""
    if wanted.step_rows is None:
        assert wanted.rows and wanted.microbatches, "the rows of a step must follow from something"
        yield wanted.rows, wanted.microbatches
        return
    if wanted.step_rows % dp:
        return
    here = wanted.step_rows // dp
    for rows in [wanted.rows] if wanted.rows else (1, 2, 4, 8, 16):
        if here % rows == 0 and wanted.microbatches in (None, here // rows):
            yield rows, here // rows
