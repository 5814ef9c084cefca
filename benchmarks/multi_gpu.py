"""What tensor, pipeline and data parallelism cost on the GPUs of one host: training steps through NCCL.

    python benchmarks/multi_gpu.py --model CONFIG.json --rows 4
    python benchmarks/multi_gpu.py --model CONFIG.json --planned 2 --step_rows 32 --recompute auto --memory 76

Starts torchrun for every layout that the GPUs here allow (or those of --only), one after another: the trainer of a run
on a model of the shape of a config.json, random weights and random tokens, all labelled, LoRA r = 16 on all linears
with dropout 0.1. Prints tokens/s for each GPU beside one GPU with the same microbatches, what `megalora plan` predicts
and, for pipelines, the schedule's own bubble. --planned N takes the N layouts that `megalora plan` puts first in place
of those of the table. --alone false leaves the single GPU out, for models too large for it. Without GPUs it runs on CPU
processes (--processes), which proves the script and nothing about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import read_fields, record, where_of
from train_step import LEARNING_RATE, randomize

from megalora.adapters.config import LoraConfig
from megalora.batch import Batch
from megalora.building import (
    EngineSettings,
    build_trainer,
    largest_exchange,
    resolve_lora,
)
from megalora.choices import BASE_FORMATS, RECOMPUTE
from megalora.cluster.launch import choose_device, distributed
from megalora.compute_dtype import DTYPES, local_dtype
from megalora.data.context import cut_batch
from megalora.models.config import config_from_dict
from megalora.parallel.formats import BaseFormat
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.peer_memory import choose_exchange
from megalora.parallel.placement import Placement
from megalora.pipeline.actions import COMPUTE
from megalora.pipeline.schedule import SCHEDULES
from megalora.pipeline.simulate import simulate
from megalora.planning.devices import device_of
from megalora.planning.fitting import Budget, Fitting
from megalora.planning.layouts import Planner, predicted
from megalora.planning.nodes import Workload
from megalora.planning.plans import Cluster, Wanted
from megalora.planning.plans import Layout as PlanLayout

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"}
PASSED = (
    *("rows", "seq_length", "steps", "recompute", "memory", "host"),
    *("base_format", "partition_method", "dtype", "tp_comm_overlap"),
)
WARM_UP = 2  # steps before those that count


@dataclass(frozen=True)
class Layout:
    """One run. microbatches: of a step of one data-parallel rank. sequence_parallel: where tp > 1."""

    name: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    microbatches: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    cp: int = 1
    rows: int | None = None  # of a microbatch, in place of --rows

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    def efficiency(self) -> float | None:
        """The part of the time that the pipeline's stages compute: forward and backward of a LoRA step take alike."""
        if self.pp == 1:
            return None
        programme = SCHEDULES[self.schedule].programme(self.pp, self.microbatches, 0, self.chunks)
        timeline = simulate(programme, lambda stage, action: float(action.op in COMPUTE))
        return 1.0 - timeline.bubble


def layouts(processes: int) -> list[Layout]:
    """Every layout of the table that `processes` GPUs allow; those of one GPU come first, to be compared with."""
    interleaved = {"schedule": "interleaved_1f1b", "chunks": 2}
    wanted = [
        Layout("one", microbatches=2),
        Layout("one, 16 microbatches", microbatches=16),
        Layout("tp2", tp=2, microbatches=2),
        Layout("tp4", tp=4, microbatches=2),
        Layout("dp2", dp=2, microbatches=2),
        Layout("dp4", dp=4, microbatches=2),
        Layout("pp2, 1f1b", pp=2, microbatches=16),
        Layout("pp2, interleaved", pp=2, microbatches=16, **interleaved),
        Layout("pp4, 1f1b", pp=4, microbatches=16),
        Layout("pp4, interleaved", pp=4, microbatches=16, **interleaved),
        Layout("tp2 pp2", tp=2, pp=2, microbatches=16),
        Layout("tp2 pp2 dp2", tp=2, pp=2, dp=2, microbatches=16),
        Layout("tp4 pp2", tp=4, pp=2, microbatches=16),
        Layout("tp8", tp=8, microbatches=2),
        Layout("cp2", cp=2, microbatches=2),
        Layout("cp4", cp=4, microbatches=2),
        Layout("cp8", cp=8, microbatches=2),
        Layout("tp2 cp4", tp=2, cp=4, microbatches=2),
    ]
    return [layout for layout in wanted if layout.processes <= processes]


def planned(options: argparse.Namespace, device: torch.device) -> list[Layout]:
    """The layouts that the planner puts first, each of other sizes."""
    config = config_from_dict(read_fields(options.model))
    lora, dtype = resolve_lora(LoraConfig.from_dict(LORA), config), local_dtype(options.dtype, device)
    work = Workload(1, options.seq_length, element=dtype.itemsize, base_format=options.base_format)
    usable, host = (int(size * 2**30) for size in (options.memory, options.host))
    cluster = Cluster(options.processes, options.processes, usable, device_of(device), host)
    wanted = Wanted(work, options.step_rows, cp=None, recompute=options.recompute)
    plans, _ = Planner(config, lora, cluster, device.type).search(wanted)
    if not plans:
        raise SystemExit(f"no layout of {options.processes} processes fits into {options.memory:g} GiB each")
    found = []
    for number, one in enumerate(plan.layout for plan in plans[: options.planned]):
        sizes = {"tp": one.tp, "pp": one.pp, "dp": one.data, "cp": one.cp}
        name = " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "one"
        more = {"microbatches": one.microbatches, "schedule": one.schedule, "chunks": one.chunks, "rows": one.work.rows}
        name = f"plan {number + 1}: {name}, {one.microbatches} x {one.work.rows}, {one.schedule}"
        found.append(Layout(name, **sizes, **more))
    return found


class Tokens:
    """The microbatches of a data-parallel rank in every step, with counts over all of them."""

    def __init__(self, layout: Layout, mesh: ParallelMesh, rows: int, length: int, vocab_size: int):
        self.microbatches = []
        for m in range(layout.microbatches):
            number = mesh.dp.rank * layout.microbatches + m
            ids = torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(number))
            labels = torch.full_like(ids, -100)
            labels[:, :-1] = ids[:, 1:]
            whole = Batch(
                input_ids=ids.flatten(),
                labels=labels.flatten(),
                position_ids=torch.arange(length).repeat(rows),
                cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * length,
                token_index=number * rows * length + torch.arange(rows * length),
            )
            self.microbatches.append(whole if mesh.cp.size == 1 else cut_batch(whole, mesh.cp.rank, mesh.cp.size))
        count = layout.dp * layout.microbatches * rows
        self.label_count, self.token_count = count * (length - 1), count * length


def worker(layout: Layout, options: argparse.Namespace) -> None:
    """This rank of a layout; the first writes the figures to --output."""
    device, _ = choose_device()
    config = config_from_dict(read_fields(options.model))
    with distributed(device, layout.tp, layout.pp, cp=layout.cp) as mesh:
        dtype, lora = local_dtype(options.dtype, device), resolve_lora(LoraConfig.from_dict(LORA), config)
        rows = layout.rows or options.rows
        tokens, overlap = rows * options.seq_length // layout.cp, {"auto": None, "true": True, "false": False}
        exchange_bytes = largest_exchange(config, lora, layout.tp, tokens, dtype, device)
        before = torch.cuda.memory_reserved() if device.type == "cuda" else 0
        exchange, note = choose_exchange(
            overlap[options.tp_comm_overlap] if layout.tp > 1 else None, mesh, layout.tp > 1, device, exchange_bytes
        )
        unseen = 0  # bytes of the exchange that torch's allocator does not count: its newer versions do
        if exchange is not None:
            unseen = max(0, exchange_bytes - (torch.cuda.memory_reserved() - before))
        base = BaseFormat(options.base_format)
        place = Placement(mesh.tp, layout.tp > 1, dtype, device, exchange, base=base, cp=mesh.cp)
        auto = options.recompute == "auto"
        work = Workload(
            rows,
            options.seq_length,
            element=place.dtype.itemsize,
            sequence_parallel=place.sequence_parallel,
            recompute="none" if auto else options.recompute,
            base_format=options.base_format,
            context_parallel=layout.cp,
        )
        budget = Budget(*(int(size * 2**30) for size in (options.memory, options.host)))
        settings = EngineSettings(
            work,
            lambda step: LEARNING_RATE,
            partition_method=options.partition_method,
            schedule=layout.schedule,
            chunks=layout.chunks,
            fitting=Fitting("auto", budget, microbatches=layout.microbatches) if auto else Fitting(),
        )
        torch.manual_seed(mesh.rank)
        engine = build_trainer(config, mesh, lora, place, settings, randomize)
        if device.type == "cuda":  # what making and quantising random weights took is not what steps take
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer, cut = engine.trainer, engine.cut
        data = Tokens(layout, mesh, rows, options.seq_length, config.vocab_size)
        seconds = []
        with contextlib.closing(trainer):
            for number in range(WARM_UP + options.steps):
                start = time.perf_counter()
                loss = trainer.step(number, data).loss  # read on the host: the step has ended
                seconds.append(time.perf_counter() - start)
        peak = (torch.cuda.max_memory_reserved() + unseen) / 2**30 if device.type == "cuda" else None
        if mesh.rank == 0:
            shape = PlanLayout(
                layout.tp, layout.pp, layout.dp * layout.cp, layout.schedule, layout.chunks, layout.microbatches,
                cut.fit.work, tp_comm_overlap=exchange is not None,
            )  # fmt: skip
            plan = predicted(config, lora, shape, cut.layers, device)
            figures = {"seconds": seconds[WARM_UP:], "tokens": data.token_count, "loss": loss, "peak_gib": peak}
            figures |= {"note": note, "planned": plan.tokens_per_second, "planned_gib": plan.memory / 2**30}
            options.output.write_text(json.dumps(figures))


class ChildFailed(Exception):
    """The processes of a layout ended with an error; says which."""


def run(layout: Layout, options: argparse.Namespace) -> dict:
    """What `worker` of the layout writes, in processes of its own. Raises ChildFailed."""
    figures = options.output.with_suffix(".worker.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(layout.processes)]
    command += [__file__, "--model", options.model, "--worker", json.dumps(asdict(layout)), "--output", str(figures)]
    for name in PASSED:
        command += [f"--{name}", str(getattr(options, name))]
    # NVLink multicast is left off: not every host lets a container use it, and NCCL would hang in its set-up.
    environment = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"} | dict(os.environ)
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ChildFailed(f"{layout.name}: exit status {done.returncode}\n{done.stderr[-4000:]}")
    found = json.loads(figures.read_text())
    figures.unlink()
    return found


def asked_for(options: argparse.Namespace, device: torch.device) -> list[Layout]:
    """The layouts to run, one GPU with the same microbatches before them."""
    if options.planned is not None:
        return planned(options, device)
    chosen = [layout for layout in layouts(options.processes) if options.only is None or layout.name in options.only]
    compared = {layout.microbatches for layout in chosen} if options.alone == "true" else ()
    alone = [layout for layout in layouts(1) if layout.microbatches in compared]
    return alone + [layout for layout in chosen if layout.processes > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="config.json")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2, help="default: the GPUs here")
    parser.add_argument("--only", nargs="*", help="names of layouts; those of one process that they need run too")
    parser.add_argument("--alone", choices=("true", "false"), default="true", help="one GPU to compare with")
    parser.add_argument("--rows", type=int, default=1, help="of a microbatch")
    parser.add_argument("--seq_length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--planned", type=int, help="run so many layouts, those that the plan puts first")
    parser.add_argument("--step_rows", type=int, default=32, help="with --planned: rows of a step of all GPUs")
    parser.add_argument("--recompute", default="none", choices=RECOMPUTE)
    parser.add_argument("--memory", type=float, default=76.0, help="GiB of each GPU for recompute auto and --planned")
    parser.add_argument("--host", type=float, default=0.0, help="GiB of host memory that each may offload to")
    parser.add_argument("--base_format", default="dense", choices=("dense", *BASE_FORMATS))
    parser.add_argument("--partition_method", default="uniform", choices=("uniform", "cost"))
    parser.add_argument("--tp_comm_overlap", default="auto", choices=("auto", "true", "false"))
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--output", type=Path, default=Path("multi_gpu.json"), help="JSON file for the result")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(Layout(**json.loads(options.worker)), options)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = asked_for(options, device)
    alone: dict[int, float] = {}  # tokens/s of one GPU, by microbatches
    records, rows, failed = [], [], []
    options.output.unlink(missing_ok=True)
    where = where_of(device)
    asked = {name: value for name, value in vars(options).items() if name not in ("output", "worker")}
    columns = ("layout", "tokens/s of a GPU", "of one GPU", "by its bubble", "planned", "GiB", "planned", "last loss")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for layout in chosen:
        try:
            figures = run(layout, options)
        except ChildFailed as error:  # the others are still worth having
            failed.append(layout.name)
            print(error, file=sys.stderr, flush=True)
            continue
        each = figures["tokens"] / statistics.median(figures["seconds"]) / layout.processes
        if layout.processes == 1:
            alone[layout.microbatches] = each
        base, expected = alone.get(layout.microbatches), layout.efficiency()
        ratio, bubble = ("" if value is None else f"{value:.3f}" for value in (base and each / base, expected))
        peak = "" if figures["peak_gib"] is None else f"{figures['peak_gib']:.1f}"
        plan, planned_peak = f"{figures['planned'] / layout.processes:,.0f}", f"{figures['planned_gib']:.1f}"
        cells = [layout.name, f"{each:,.0f}", ratio, bubble, plan, peak, planned_peak, f"{figures['loss']:.4f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
        if figures["note"]:
            print(f"{layout.name}: {figures['note']}", file=sys.stderr, flush=True)
        records.append({"layout": asdict(layout), "each": each, "predicted": expected, **figures})
        rows.append(cells)
        about = f"{options.rows} rows of {options.seq_length} tokens, recompute {options.recompute}."
        figures = {"options": asked, "records": records}
        card = f"{options.processes} x {where}"
        record(options.output, "Several GPUs of one host", about, card, columns, rows, figures)
    print(f"{options.processes} x {where}, torch {torch.__version__}, {options.rows} rows of {options.seq_length}")
    if failed:
        raise SystemExit(f"these did not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
