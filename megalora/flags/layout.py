"""Sections of the layout: how a model is divided over processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megalora.errors import UserError
from megalora.flags import shared
from megalora.flags.flag import Section, flag, show
from megalora.flags.rules import no_effect
from megalora.pipeline.schedule import SCHEDULES


@dataclass(frozen=True)
class LayoutArguments(Section):
    """How the model is divided."""

    tensor_parallel_size: int = shared.TENSOR_PARALLEL_SIZE.field(1)
    pipeline_parallel_size: int = shared.PIPELINE_PARALLEL_SIZE.field(1)
    partition_method: str = shared.PARTITION_METHOD.field("uniform")
    custom_partition: tuple[int, ...] | None = shared.CUSTOM_PARTITION.field(None, unset="none")
    uneven_heads: bool = shared.UNEVEN_HEADS.field(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition_method == "custom" and self.custom_partition is None:
            example = " ".join(["8"] * self.pipeline_parallel_size)
            raise UserError(
                "partition_method custom needs custom_partition",
                f"give the number of layers of each stage, for example --custom_partition {example}",
            )
        if self.custom_partition is not None and self.partition_method != "custom":
            raise no_effect("custom_partition", self.custom_partition, vars(self))
        parts = self.pipeline_parallel_size * self.chunks
        if self.custom_partition is not None and len(self.custom_partition) != parts:
            what, size = "stage", "pipeline_parallel_size"
            if self.chunks > 1:
                what, size = "chunk", "pipeline_parallel_size * virtual_pipeline_size"
            raise UserError(
                f"custom_partition {show(self.custom_partition)} names {len(self.custom_partition)} {what}s, but "
                f"{size} is {parts}",
                f"give one number of layers for each {what}",
            )

    @property
    def chunks(self) -> int:
        """Chunks of layers that each stage holds."""
        return 1

    @property
    def context(self) -> int:
        """Ranks that each document is cut over."""
        return 1


@dataclass(frozen=True)
class ParallelArguments(LayoutArguments):
    """How the model is divided over the processes. Data-parallel size = world size / (tensor * pipeline)."""

    partition_method: str = shared.PARTITION_METHOD.field("cost")
    nproc: int | None = shared.NPROC.field(None, unset="those of torchrun, or one")
    layout: str | None = flag(
        None,
        "auto lets the planner choose what is not given of the layout, at the same rows of a step; manual takes the "
        "flags as they are",
        choices=("auto", "manual"),
        unset="auto on several GPUs where no flag of the layout is given, else manual",
        training_only=True,
    )
    sequence_parallel: bool | None = shared.SEQUENCE_PARALLEL.field(
        None, unset="true where tensor_parallel_size divides the tokens of a microbatch"
    )
    context_parallel_size: int = shared.CONTEXT_PARALLEL_SIZE.field(1)
    tp_comm_overlap: bool | None = flag(
        None,
        "overlap sequence-parallel communication with matrix products, by direct copies between GPUs instead of NCCL",
        unset="true where the GPUs of a tensor-parallel group can access each other's memory",
        training_only=True,
    )
    schedule: str = shared.SCHEDULE.field("1f1b")
    virtual_pipeline_size: int = shared.VIRTUAL_PIPELINE_SIZE.field(1)
    recompute: str = shared.RECOMPUTE_FLAG.field("auto")
    recompute_layers: int | None = flag(
        None, "with recompute full, recompute only the first so many layers of each stage", at_least=1, unset="all",
        training_only=True,
    )  # fmt: skip
    offload_activations: bool | None = flag(
        None,
        "keep what recomputed layers keep in pinned host memory, copied beside the compute",
        unset="with recompute auto on GPUs, as many layers as memory needs",
        training_only=True,
    )
    memory: float | None = shared.MEMORY.field(None, unset="3 less than is free, for recompute auto")
    heartbeat_timeout: float = flag(30.0, "stop the run if a rank sends no heartbeat for this many seconds", at_least=5)
    profile_file: str | None = shared.PROFILE_FILE.field(None, unset="estimated times")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_schedule()
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise no_effect("sequence_parallel", True, vars(self))
        if self.recompute_layers is not None and self.recompute != "full":
            raise no_effect("recompute_layers", self.recompute_layers, vars(self))
        if self.memory is not None and self.recompute != "auto":
            raise no_effect("memory", self.memory, vars(self))
        if self.offload_activations and self.recompute in ("none", "selective"):
            raise no_effect("offload_activations", True, vars(self))
        if self.profile_file is not None and self.partition_method != "cost":
            raise no_effect("profile_file", self.profile_file, vars(self))

    @property
    def chunks(self) -> int:
        return self.virtual_pipeline_size

    @property
    def context(self) -> int:
        return self.context_parallel_size

    def for_tokens(self, tokens: int) -> ParallelArguments:
        """Return these with sequence_parallel decided, for microbatches of `tokens` tokens on a replica."""
        if self.sequence_parallel is not None:
            return self
        tp = self.tensor_parallel_size
        return replace(self, sequence_parallel=tp > 1 and tokens % tp == 0)

    def _check_schedule(self) -> None:
        schedule = SCHEDULES[self.schedule]
        if self.virtual_pipeline_size > 1 and not schedule.chunked:
            raise no_effect("virtual_pipeline_size", self.virtual_pipeline_size, vars(self))
        if schedule.chunked and (self.virtual_pipeline_size == 1 or self.pipeline_parallel_size == 1):
            raise UserError(
                f"schedule {self.schedule} needs a pipeline_parallel_size (it is {self.pipeline_parallel_size}) and a "
                f"virtual_pipeline_size (it is {self.virtual_pipeline_size}) of 2 or more",
                "give both, or choose another schedule",
            )
        if self.recompute == "full" and schedule.recomputes(0, max(2, self.pipeline_parallel_size)):
            raise UserError(
                f"recompute full and schedule {self.schedule} would compute the layers three times: the schedule "
                f"already recomputes whole stages",
                "leave one of them out",
            )


def validate_world(parallel: LayoutArguments, world_size: int) -> int:
    """Return the data-parallel size: world_size / (tensor * pipeline * context). UserError where that is not whole."""
    tensor, pipeline, context = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context
    model = tensor * pipeline * context
    if world_size % model == 0 and world_size > 0:
        return world_size // model
    below = world_size // model * model
    beside = f" * context_parallel_size ({context})" if context > 1 else ""
    counts = f"{below} or {below + model}" if below else str(model)
    raise UserError(
        f"World size ({world_size}) is not a multiple of tensor_parallel_size ({tensor}) * "
        f"pipeline_parallel_size ({pipeline}){beside} = {model}",
        f"start {counts} processes, or choose sizes whose product divides {world_size}"
        if world_size > 1
        else f"start {counts} processes: --nproc {counts.split()[0]} on this host, torchrun on several",
    )
