"""What of a stage's layers to compute again in backward, and what to keep in host memory, so that a step fits.

As little as the memory allows, in the order of what it costs: nothing; the normed inputs of linears; the MLPs' inner
activations; whole layers but for the result of attention; these kept in host memory, where there is room; and last,
attention too. Each goes layer by layer from the first of the stage on: those are the last whose backward comes, when
most of what the others keep is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megalora.parallel.collectives import gather_objects
from megalora.parallel.mesh import Axis
from megalora.planning.memory import Memory, stage_memory
from megalora.planning.node import Workload
from megalora.planning.nodes import chunk_nodes, host_bytes
from megalora.planning.shapes import Shape


@dataclass(frozen=True)
class Budget:
    """Bytes that a rank may take: device, as torch's allocator counts them, and host."""

    device: int
    host: int = 0


@dataclass(frozen=True)
class Fitting:
    """How it is chosen what to compute again.

    method        one of choices.RECOMPUTE; None: the workload says what is computed again
    budget        what the step may take, for "auto"; None: as much as it wants
    layers        with "full": only the first so many of each stage
    offloads      keep what recomputed layers keep in host memory, as far as the budget goes; None: with "auto" as many
                  as needed
    microbatches  of a step of one data-parallel rank
    """

    method: str | None = None
    budget: Budget | None = None
    layers: int | None = None
    offloads: bool | None = None
    microbatches: int = 1

    def choose(self, stage: StageUse, work: Workload) -> Fit:
        """Return how the stage is run."""
        count = len(stage.layers)
        host = 0 if self.budget is None or self.offloads is False else self.budget.host
        if self.method == "auto" and self.budget is not None and not self.offloads:
            return fit(stage, work, Budget(self.budget.device, host))
        if self.method == "auto" and self.budget is not None:
            work = _offloading(stage, work, host, 0)
        elif self.method == "full":
            offloaded = _offloading(stage, work, host, count).offloaded if self.offloads else frozenset()
            work = first_layers(work, stage, count if self.layers is None else self.layers, "full")
            work = replace(work, offloaded=frozenset(i for i in offloaded if work.level(i) == "full"))
        elif self.method is not None:
            work = replace(work, recompute="none" if self.method == "auto" else self.method)
        return Fit(work, stage.memory(work), stage.host(work))


@dataclass(frozen=True)
class StageUse:
    """A stage as its schedule uses it; the fields as `stage_memory` takes them."""

    shape: Shape
    chunks: tuple[range, ...]
    first: bool
    last: bool
    in_flight: int = 1
    inputs: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(i for chunk in self.chunks for i in chunk)

    def memory(self, work: Workload) -> Memory:
        """Return what the stage needs on its device."""
        return stage_memory(
            self.shape,
            self.chunks,
            work,
            first=self.first,
            last=self.last,
            in_flight=self.in_flight,
            inputs=self.inputs,
        )

    def host(self, work: Workload) -> int:
        """Return the bytes that it keeps in host memory."""
        return self.in_flight * sum(
            host_bytes(chunk_nodes(self.shape, chunk, work, first=False, last=False)) for chunk in self.chunks
        )


@dataclass(frozen=True)
class Fit:
    """How a stage is run. memory, host: what it needs so; lacks: bytes of that which the budget does not have."""

    work: Workload
    memory: Memory
    host: int
    lacks: int = 0

    @property
    def note(self) -> str | None:
        """A line for the user where even the least that the stage can need is more than there is."""
        if not self.lacks:
            return None
        need, room = (size / 2**30 for size in (self.memory.total, self.memory.total - self.lacks))
        return (
            f"recompute auto: with all layers computed again a stage needs {need:.1f} GiB by the plan's count, and may "
            f"take {room:.1f}: it will probably run out of memory (give a smaller per_device_train_batch_size, a "
            "shorter seq_length, more ranks to a copy of the model, or --base_format nf4)"
        )

    def words(self, layers: Sequence[int]) -> str:
        """Return what is recomputed of these layers, such as "3 full (2 in host memory), 5 none"."""
        counts: dict[str, list[int]] = {}
        for i in layers:
            found = counts.setdefault(self.work.level(i), [0, 0])
            found[0] += 1
            found[1] += i in self.work.offloaded
        each = [f"{n} {level}" + (f" ({m} in host memory)" if m else "") for level, (n, m) in counts.items()]
        return ", ".join(each)


AS_GIVEN = Fitting()


def fit(stage: StageUse, work: Workload, budget: Budget) -> Fit:
    """Return the workload that computes the least again of those that fit the budget, else the one that needs least."""
    best = None
    for count, choice in _phases(stage, work, budget.host):
        # Within a phase each layer more takes less memory: the least number that fits.
        low, high = 0, count
        if stage.memory(choice(high)).total > budget.device:
            best = choice(high)
            continue
        while low < high:
            middle = (low + high) // 2
            if stage.memory(choice(middle)).total <= budget.device:
                high = middle
            else:
                low = middle + 1
        best = choice(low)
        break
    memory = stage.memory(best)
    return Fit(best, memory, stage.host(best), max(0, memory.total - budget.device))


def first_layers(work: Workload, stage: StageUse, count: int, level: str, rest: str = "none") -> Workload:
    """Return the workload with the stage's first `count` layers at one level, and the rest at another."""
    levels = [rest] * len(stage.shape.layers)
    for i in stage.layers[:count]:
        levels[i] = level
    return replace(work, recompute=tuple(levels), offloaded=frozenset())


def of_all_stages(work: Workload, own: Sequence[int], pp: Axis) -> Workload:
    """Return the workload with what every stage computes again, given that of this one's layers. Collective over pp."""
    if pp.size == 1 or isinstance(work.recompute, str):
        return work
    levels, offloaded = list(work.recompute), set()
    for stage in gather_objects({i: (work.level(i), i in work.offloaded) for i in own}, pp):
        for i, (level, offloads) in stage.items():
            levels[i] = level
            offloaded |= {i} if offloads else set()
    return replace(work, recompute=tuple(levels), offloaded=frozenset(offloaded))


def _phases(stage: StageUse, work: Workload, host: int) -> list[tuple[int, Callable[[int], Workload]]]:
    """Return (number of layers, the workload with so many of them changed) of each phase, in order."""
    count = len(stage.layers)

    def more(level: str, rest: str) -> tuple[int, Callable[[int], Workload]]:
        return count, lambda n: first_layers(work, stage, n, level, rest)

    phases = [more("norms", "none"), more("mlp", "norms"), more("layer", "mlp")]
    if host:
        most = _offloading(stage, work, host, 0)
        phases.append((len(most.offloaded), lambda n: replace(most, offloaded=frozenset(stage.layers[:n]))))
    return [*phases, (count, lambda n: _offloading(stage, work, host, n))]


def _offloading(stage: StageUse, work: Workload, host: int, full: int) -> Workload:
    """Return the workload with the first `full` layers without their attention, the rest with it, and as many of all
    in host memory as it has room for."""
    sizes = {
        level: _size_on_host(stage, first_layers(work, stage, len(stage.layers), level)) for level in ("layer", "full")
    }
    mixed, room, offloaded = first_layers(work, stage, full, "full", "layer"), host, set()
    for number, i in enumerate(stage.layers):
        room -= sizes["full" if number < full else "layer"]
        if room < 0:
            break
        offloaded.add(i)
    return replace(mixed, offloaded=frozenset(offloaded))


def _size_on_host(stage: StageUse, work: Workload) -> int:
    """Return what one layer at the workload's level would keep in host memory, for all microbatches in flight."""
    layers: Sequence[int] = stage.layers
    return -(-stage.host(replace(work, offloaded=frozenset(layers))) // max(1, len(layers)))
