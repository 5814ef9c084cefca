"""What a search of layouts is about: the GPUs, what is wanted, a layout, and what is predicted of it."""

from __future__ import annotations

from dataclasses import dataclass

from megalora.models.graphs import BUSY
from megalora.pipeline.simulate import Timeline
from megalora.planning.devices import Device
from megalora.planning.memory import Memory
from megalora.planning.node import Workload
from megalora.planning.timing import Seconds

Sizes = tuple[int, int, int]
"""Ranks of the tensor-, pipeline- and context-parallel axes."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind. usable: bytes of each that torch's allocator may take; host: of host memory, for each."""

    gpus: int
    gpus_per_node: int
    usable: int
    device: Device
    host: int = 0

    def speed(self, stride: int, ranks: int) -> float:
        """Return bytes a second between ranks that stand `stride` apart, `ranks` of them."""
        return self.device.collective if stride * (ranks - 1) < self.gpus_per_node else self.device.network


@dataclass(frozen=True)
class Wanted:
    """What a layout must be; None: every value is tried (of cp those above 1 only where nothing else fits).

    step_rows     rows of a step over all GPUs; None: rows * microbatches of each data-parallel rank
    work          rows and recompute of it are replaced by those of the layout
    recompute_layers, offloads  as `Fitting` takes them
    """

    work: Workload
    step_rows: int | None
    rows: int | None = None
    microbatches: int | None = None
    tp: int | None = None
    pp: int | None = None
    cp: int | None = 1
    sequence_parallel: bool | None = None
    schedule: str | None = None
    chunks: int | None = None
    recompute: str | None = None
    partition_method: str = "cost"
    custom_partition: tuple[int, ...] | None = None
    uneven_heads: bool = False
    recompute_layers: int | None = None
    offloads: bool | None = None


@dataclass(frozen=True)
class Layout:
    """How a step runs on the GPUs. chunks of layers a stage; microbatches of a step of a data-parallel rank.

    dp        ranks with the same parameters: data-parallel ones, times the context-parallel ones of the work
    cuda_graphs, tp_comm_overlap  as the flags of a run; None: what a run then does
    auto      each stage recomputes as little as fits (recompute auto), whatever the work says
    recompute_layers, offloads  as `Fitting` takes them
    """

    tp: int
    pp: int
    dp: int
    schedule: str
    chunks: int
    microbatches: int
    work: Workload
    cuda_graphs: bool | None = None
    tp_comm_overlap: bool | None = None
    auto: bool = False
    recompute_layers: int | None = None
    offloads: bool | None = None

    @property
    def cp(self) -> int:
        """Ranks that share the tokens of each row."""
        return self.work.context_parallel

    @property
    def data(self) -> int:
        """Ranks that have other rows each."""
        return self.dp // self.cp

    @property
    def recompute(self) -> str:
        """What is recomputed, as the flag of a run."""
        return "auto" if self.auto else str(self.work.recompute)

    @property
    def graphs(self) -> bool:
        """Whether the layers run as CUDA graphs (see megalora.models.graphs.choose_graphs)."""
        if self.cuda_graphs is not None:
            return self.cuda_graphs
        return self.pp == 1 and self.cp == 1 and self.work.element == 2 and self.work.tokens < BUSY

    @property
    def pace(self) -> tuple:
        """All that the time of a layer depends on."""
        return self.tp, self.work, self.graphs, self.tp_comm_overlap

    @property
    def tokens(self) -> int:
        """Of one step over all GPUs."""
        return self.dp * self.microbatches * self.work.tokens


@dataclass(frozen=True)
class StagePlan:
    """One stage: its chunks of layers, what it needs, what a microbatch takes in each, its share of all.

    recompute  what of its layers is recomputed, in words; host: bytes in host memory
    """

    chunks: tuple[range, ...]
    memory: Memory
    seconds: tuple[Seconds, ...]
    share: float
    recompute: str = "none"
    host: int = 0

    @property
    def microbatch(self) -> float:
        return sum(seconds.total for seconds in self.seconds)


@dataclass(frozen=True)
class Plan:
    """A layout with all that is predicted of it. seconds: of a step, the optimizer and its reduction included."""

    layout: Layout
    stages: tuple[StagePlan, ...]
    timeline: Timeline
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.layout.tokens / self.seconds

    @property
    def memory(self) -> int:
        """Bytes on the fullest stage."""
        return max(stage.memory.total for stage in self.stages)


@dataclass(frozen=True)
class TooLarge:
    """What needs the least of the layouts of these sizes, none of which fits."""

    layout: Layout
    stage: int
    memory: Memory
