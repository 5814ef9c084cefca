"""`megalora plan`: what a run will need and take on given GPUs, and the layout to run it in. Runs nothing."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megalora.adapters.config import LoraConfig, ResolvedLora
from megalora.added_tokens import AddedToken
from megalora.building import resolve_base, resolve_lora
from megalora.compute_dtype import DTYPES
from megalora.errors import UserError
from megalora.flags import ParallelArguments, PlanArguments
from megalora.models.config import check_length, read_config
from megalora.models.spec import ModelSpec
from megalora.planning.devices import DEVICES, Device
from megalora.planning.draw import Panel, boxes_of, svg
from megalora.planning.layouts import Planner
from megalora.planning.longest import longest_rows
from megalora.planning.nodes import Workload
from megalora.planning.plans import Cluster, Layout, Plan, StagePlan, TooLarge, Wanted
from megalora.planning.shapes import shape_of
from megalora.planning.timing import chunk_seconds
from megalora.profiling import Measured, read_profile
from megalora.rows import refuse_of_sources
from megalora.vocabulary import train_rows_of, with_rows_for

_GIB = 2**30
_STEP_ROWS = 128  # of a step over all GPUs, where nothing says how many
_SHOWN = 12  # layouts of the table
_WIDTH = 120  # columns where there is no terminal to ask


def plan(arguments: PlanArguments) -> list[Plan]:
    """Print the ranked table of layouts and the stages of the best; return the layouts that fit, best first.

    Raises UserError where nothing fits.
    """
    config = read_config(arguments.model_path)
    if config.encoder is None:
        refuse_of_sources(config, source_length=arguments.source_length)
    elif arguments.longest:
        what = f"longest is not implemented for {config.model_type}, whose rows have two lengths"
        raise UserError(what, "leave it out")
    lora_config = LoraConfig() if arguments.lora_config is None else LoraConfig.from_json(arguments.lora_config)
    if names := arguments.new_special_tokens:
        added = [AddedToken(config.vocab_size + i, name) for i, name in enumerate(names)]
        config = with_rows_for(config, added, arguments.model_path)
        lora_config = train_rows_of(lora_config, config, added)
    lora = resolve_lora(lora_config, config)
    base_format = resolve_base(arguments.base_format, config).name
    device = DEVICES[arguments.device]
    if base_format == "nf4_fp8" and _type(arguments) == "cuda":
        _refuse_without_fp8(device, arguments.dtype)
    memory = arguments.memory or device.capacity
    if arguments.reserve >= memory:
        raise UserError(f"reserve ({arguments.reserve:g} GiB) is not less than memory ({memory:g} GiB)", "choose less")
    if arguments.profile_file is not None:
        device = device.scaled(_slowness(arguments, config, lora, device, base_format))
    usable, host = int((memory - arguments.reserve) * _GIB), int(arguments.host_memory * _GIB)
    cluster = Cluster(arguments.gpus, arguments.gpus_per_node, usable, device, host)
    planner = Planner(config, lora, cluster, _type(arguments))
    wanted = _wanted(arguments, base_format, config.encoder is not None)
    plans, too_large = (
        longest_rows(planner, wanted, arguments.gpus) if arguments.longest else planner.search(wanted)
    )
    if not plans:
        raise nothing_fits(too_large[0], cluster, memory)
    console = Console(highlight=False, width=None if Console().is_terminal else _WIDTH)
    best = plans[0]
    longer = check_length(config, best.layout.work.seq_length)
    console.print(_title(config, lora, base_format, arguments, memory))
    if longer is not None:
        console.print(longer)
    console.print((_lengths if arguments.longest else _layouts)(plans, too_large))
    again = any(stage.recompute != f"{_count(stage)} none" for stage in best.stages)
    passes = "forward + again + backward" if again else "forward + backward"
    console.print(
        f"The {'longest' if arguments.longest else 'best'}, stage by stage: its share of the compute, ms of a "
        f"microbatch ({passes}), GiB (adapters with their optimizer)"
    )
    console.print(_stages(best))
    console.print("Run it with:\n" + _flags(best, arguments), soft_wrap=True)
    if arguments.draw is not None:
        draw(best, arguments.draw)
        console.print(f"\nIts step is drawn in {arguments.draw}")
    return plans


def _refuse_without_fp8(device: Device, dtype: str) -> None:
    """Raise UserError where a run would refuse nf4_fp8: products would not be in fp8."""
    if not device.gemm8:
        raise UserError(f"base_format nf4_fp8: device {device.name} does not multiply fp8", "choose nf4")
    if dtype != "bfloat16":
        raise UserError(f"base_format nf4_fp8: goes with dtype bfloat16 on GPUs, and dtype is {dtype}", "choose nf4")


def _wanted(arguments: PlanArguments, base_format: str, encodes: bool) -> Wanted:
    """Return what is searched. encodes: the model is an encoder-decoder."""
    microbatches, step_rows = arguments.gradient_accumulation_steps, arguments.global_batch_size
    rows = arguments.per_device_train_batch_size
    if arguments.longest:
        step_rows = rows = None
    elif step_rows is None and microbatches is None:
        step_rows = -(-_STEP_ROWS // arguments.gpus) * arguments.gpus  # so that any number of replicas can share them
    if step_rows is None:
        rows = rows or 1
    work = Workload(
        1,
        arguments.seq_length,
        element=DTYPES[arguments.dtype].itemsize,
        base_format=base_format,
        merges=DEVICES[arguments.device].merges,
    )
    if encodes:
        work = replace(work, source_length=arguments.source_length or arguments.seq_length)
    return Wanted(
        work,
        step_rows,
        rows=rows,
        microbatches=microbatches,
        tp=arguments.tensor_parallel_size,
        pp=arguments.pipeline_parallel_size,
        cp=arguments.context_parallel_size,
        sequence_parallel=arguments.sequence_parallel,
        schedule=arguments.schedule or ("1f1b" if arguments.longest else None),
        chunks=arguments.virtual_pipeline_size,
        recompute=arguments.recompute,
        partition_method=arguments.partition_method,
        custom_partition=arguments.custom_partition,
        uneven_heads=arguments.uneven_heads,
    )


def _slowness(
    arguments: PlanArguments, config: ModelSpec, lora: ResolvedLora, device: Device, base_format: str
) -> float:
    """Return how many times as long as counted the compute of the profiled run took."""
    measured = read_profile(arguments.profile_file, config, base_format)
    dtype = arguments.dtype
    if DTYPES[dtype].itemsize != measured.element:
        dtype = next(name for name, one in DTYPES.items() if one.itemsize == measured.element)
    for flag, theirs, ours in (("device", measured.device, arguments.device), ("dtype", dtype, arguments.dtype)):
        if theirs != ours:
            raise UserError(
                f"profile_file {arguments.profile_file} is of a run whose {flag} was {theirs}",
                f"give --{flag} {theirs}, or profile a run on what is planned for",
            )
    return slowness(measured, config, lora, device, _type(arguments))


def slowness(measured: Measured, config: ModelSpec, lora: ResolvedLora, device: Device, device_type: str) -> float:
    """Return how many times as long as counted the compute of a profiled run took; device_type: "cuda" or "cpu"."""
    work = Workload(
        measured.rows,
        measured.seq_length,
        element=measured.element,
        sequence_parallel=measured.sequence_parallel,
        recompute=measured.recompute_method,
        base_format=measured.base_format,
        context_parallel=measured.context_parallel,
        merges=device.merges,
    )
    shape = shape_of(config, lora, measured.tp, device_type)
    last = len(measured.layers) - 1
    counted = 0.0
    for i, (start, stop) in enumerate(measured.layers):
        seconds = chunk_seconds(shape, range(start, stop), work, device, first=i == 0, last=i == last)
        counted += seconds.total + (seconds.forward if measured.recompute[i] else 0.0)
    return sum(measured.totals) / counted


def _type(arguments: PlanArguments) -> str:
    """Return the type of the device, as torch names it."""
    return "cpu" if arguments.device == "cpu" else "cuda"


# ---- what is printed ----


def _title(config: ModelSpec, lora: ResolvedLora, base_format: str, arguments: PlanArguments, memory: float) -> str:
    targets = ", ".join(sorted({name.rpartition(".")[2] for name in lora.adapters}))
    nodes = -(-arguments.gpus // arguments.gpus_per_node)
    base = "" if base_format == "dense" else f", base in {base_format}"
    length = "one row in each microbatch" if arguments.longest else f"{arguments.seq_length} tokens a row"
    prefix = ""
    if config.prefix is not None:
        elements = sum(math.prod(shape) for _, shape in config.prefix.tensors())
        prefix = f", behind {elements:,} parameters for images, on the first stage"
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers, hidden size {config.hidden_size}{prefix}; adapters r "
        f"{lora.config.r} on {targets}; {length}, {arguments.dtype}{base}\n"
        f"{arguments.gpus} x {arguments.device} on {nodes} node{'s' if nodes > 1 else ''}, {memory:g} GiB each, "
        f"{arguments.reserve:g} of them left free (CUDA, NCCL, fragments)"
    )


def _layouts(plans: list[Plan], too_large: list[TooLarge]) -> Table:
    layouts = [*(one.layout for one in plans), *(one.layout for one in too_large)]
    cut = any(layout.cp > 1 for layout in layouts)  # else nothing is said of context parallelism
    sizes = ("tensor", "pipeline", *(("context",) if cut else ()), "data", "schedule", "recompute", "rows")
    table = _table(*sizes, "GiB", "step", "bubble", "tokens/s")
    for one in plans[:_SHOWN]:
        table.add_row(
            *_sizes(one.layout, cut),
            f"{_gib(one.memory):.1f}",
            f"{one.seconds:.3g} s",
            f"{one.timeline.bubble:.1%}",
            f"{one.tokens_per_second:,.0f}",
        )
    for large in too_large[: max(1, _SHOWN - len(plans))]:
        table.add_row(*_sizes(large.layout, cut), f"{_gib(large.memory.total):.1f}", "does not fit", "", "")
    return table


def _lengths(plans: list[Plan], too_large: list[TooLarge]) -> Table:
    """Return the longest row of each layout."""
    table = _table("tensor", "pipeline", "context", "data", "longest row", "GiB", "host GiB", "step", "tokens/s")
    for one in plans[:_SHOWN]:
        layout, host = one.layout, max(stage.host for stage in one.stages)
        table.add_row(
            *_axes(layout, True),
            f"{layout.work.seq_length:,}",
            f"{_gib(one.memory):.1f}",
            f"{_gib(host):.1f}" if host else "-",
            f"{one.seconds:.3g} s",
            f"{one.tokens_per_second:,.0f}",
        )
    for large in too_large[: max(1, _SHOWN - len(plans))]:
        table.add_row(*_axes(large.layout, True), "none fits", f"{_gib(large.memory.total):.1f}", "", "", "")
    return table


def _axes(layout: Layout, context: bool) -> tuple[str, ...]:
    return (
        f"{layout.tp}{' + sp' if layout.work.sequence_parallel else ''}",
        str(layout.pp),
        *((str(layout.cp),) if context else ()),
        str(layout.data),
    )


def _sizes(layout: Layout, context: bool) -> tuple[str, ...]:
    chunks = f" x {layout.chunks}" if layout.chunks > 1 else ""
    return (
        *_axes(layout, context),
        (layout.schedule if layout.pp > 1 else "-") + chunks,
        layout.recompute,
        f"{layout.work.rows} x {layout.microbatches}",
    )


def _stages(chosen: Plan) -> Table:
    table = _table(
        *("stage", "layers", "share", "ms", "recompute", "weights", "adapters", "activations", "buffers", "GiB")
    )
    for number, stage in enumerate(chosen.stages):
        memory = stage.memory
        adapters = memory.adapters + memory.optimizer
        table.add_row(
            str(number),
            " ".join(f"{chunk[0]}-{chunk[-1]}" for chunk in stage.chunks),
            f"{stage.share:.1%}",
            _passes(stage),
            stage.recompute,
            *(f"{_gib(size):.2f}" for size in (memory.weights, adapters, memory.activations, memory.buffers)),
            f"{_gib(memory.total):.1f}",
        )
    return table


def _count(stage: StagePlan) -> int:
    return sum(map(len, stage.chunks))


def _passes(stage: StagePlan) -> str:
    """Return milliseconds of forward + recompute (where there is any) + backward of a microbatch."""
    sums = [sum(getattr(one, what) for one in stage.seconds) for what in ("forward", "recompute", "backward")]
    return " + ".join(f"{1e3 * seconds:.3g}" for i, seconds in enumerate(sums) if seconds or i != 1)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("schedule", "recompute", "layers") else "right")
    return table


def _gib(size: int) -> float:
    return size / _GIB


def _flags(chosen: Plan, arguments: PlanArguments) -> str:
    """Return the best layout as flags of `megalora finetune`."""
    base = "" if arguments.base_format == "auto" else f" --base_format {arguments.base_format}"
    if arguments.new_special_tokens:
        base += f" --new_special_tokens {shlex.join(arguments.new_special_tokens)}"
    work = chosen.layout.work
    sources = f" --source_length {work.source_length}" if work.source_length else ""
    return f"  {layout_flags(chosen, arguments)}{base} --seq_length {work.seq_length}{sources}"


def layout_flags(chosen: Plan, asked: PlanArguments | ParallelArguments) -> str:
    """Return the layout of a plan as flags of `megalora finetune`; what is asked gives how layers are dealt."""
    layout, work = chosen.layout, chosen.layout.work
    flags: dict[str, Any] = {
        "tensor_parallel_size": layout.tp,
        "pipeline_parallel_size": layout.pp,
        "context_parallel_size": layout.cp if layout.cp > 1 else None,
        "sequence_parallel": "false" if layout.tp > 1 and not work.sequence_parallel else None,
        "partition_method": asked.partition_method if layout.pp > 1 else None,
        "schedule": layout.schedule if layout.pp > 1 else None,
        "virtual_pipeline_size": layout.chunks if layout.chunks > 1 else None,
        "recompute": layout.recompute if layout.recompute != "auto" else None,
        "recompute_layers": layout.recompute_layers,
        "offload_activations": None if layout.offloads is None else str(layout.offloads).lower(),
        "per_device_train_batch_size": work.rows,
        "gradient_accumulation_steps": layout.microbatches,
    }
    if asked.custom_partition is not None:
        flags["custom_partition"] = " ".join(map(str, asked.custom_partition))
    return " ".join(f"--{name} {value}" for name, value in flags.items() if value is not None)


def sizes_of(layout: Layout) -> str:
    """Return the sizes of a layout's axes, in words."""
    context = f" x context {layout.cp}" if layout.cp > 1 else ""
    return f"tensor {layout.tp} x pipeline {layout.pp}{context} x data {layout.data}"


def nothing_fits(least: TooLarge, cluster: Cluster, memory: float) -> UserError:
    """Return the error that no layout fits: what the one that needs the least would need."""
    layout, parts = least.layout, least.memory
    needs = (
        f"weights {_gib(parts.weights):.1f}, adapters and optimizer {_gib(parts.adapters + parts.optimizer):.1f}, "
        f"activations {_gib(parts.activations):.1f}"
    )
    gpus = f"{cluster.gpus} GPU{'s' if cluster.gpus > 1 else ''}"
    return UserError(
        f"no layout fits {gpus} of {memory:g} GiB ({_gib(cluster.usable):.1f} usable): the one that needs "
        f"the least, {sizes_of(layout)} with recompute "
        f"{layout.recompute} and {layout.work.rows} rows a microbatch, needs {_gib(parts.total):.1f} GiB on stage "
        f"{least.stage} ({needs})",
        "give more gpus or memory, a shorter seq_length, or leave free what you fixed of the layout",
    )


# ---- what is drawn ----


def draw(chosen: Plan, path: str) -> None:
    """Write the timeline of a step as SVG. Raises UserError where the file cannot be written."""

    def again(stage: int, action: Any) -> float:
        return chosen.stages[stage].seconds[action.chunk].recompute

    layout = chosen.layout
    title = (
        f"{layout.schedule}, {layout.pp} stages, {layout.microbatches} microbatches: "
        f"{chosen.timeline.makespan:.3g} s, bubble {chosen.timeline.bubble:.1%}"
    )
    write_svg(path, [Panel(title, layout.pp, boxes_of(chosen.timeline, again))])


def write_svg(path: str | Path, panels: list[Panel]) -> None:
    """Raise UserError where the file cannot be written."""
    try:
        Path(path).write_text(svg(panels), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"draw {path} cannot be written ({error.strerror})", "name a file in a folder that can"
        ) from None
