"""One row of many tokens on one GPU, or cut over several: speed, memory against the plan's, and what is recomputed.

    python benchmarks/long_rows.py --model CONFIG.json --lengths 8192 32768 131072 --memory 76
    torchrun --nproc_per_node 2 benchmarks/long_rows.py --model CONFIG.json --lengths 65536 --cp 2

The model has the shape of a config.json and random weights, all linears r 16, and runs through the trainer of a run:
one microbatch of one row, all its tokens labelled, bfloat16. `--memory` is what recompute auto may take. GiB is what
was allocated at most, and beside it what torch's allocator held, with its fragments and its graphs' memory. With
`--layers N` the model has only its first N layers, and memory is that of so few.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch
from common import add_model, read_fields, record, where_of
from train_step import LEARNING_RATE, Step, randomize

from megalora.adapters.config import LoraConfig
from megalora.building import EngineSettings, build_trainer, largest_exchange, resolve_lora
from megalora.choices import BASE_FORMATS
from megalora.cluster.environment import environment_int
from megalora.cluster.launch import distributed
from megalora.data.context import cut_batch
from megalora.models.config import config_from_dict
from megalora.parallel.formats import BaseFormat
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.peer_memory import choose_exchange
from megalora.parallel.placement import Placement
from megalora.planning.fitting import Budget, Fitting
from megalora.planning.nodes import Workload

GIB = 2**30
ALL = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
COLUMNS = (
    *("tokens", "layers", "computed again", "seconds", "tokens/s a GPU"),
    *("GiB", "plan, GiB", "off by", "reserved, GiB", "host, GiB", "loss"),
)


def measured(
    fields: dict, length: int, options: argparse.Namespace, device: torch.device, mesh: ParallelMesh
) -> list[str]:
    """One line of the table."""
    gc.collect()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    fields = fields | {"max_position_embeddings": max(length, fields["max_position_embeddings"])}
    if options.layers:
        fields = fields | {"num_hidden_layers": options.layers}
    config = config_from_dict(fields)
    budget = Budget(int(options.memory * GIB), int(options.host * GIB)) if options.recompute == "auto" else None
    given = "none" if options.recompute == "auto" else options.recompute
    sp = mesh.tp.size > 1
    work = Workload(
        1,
        length,
        recompute=given,
        sequence_parallel=sp,
        context_parallel=mesh.cp.size,
        base_format=options.base_format,
    )
    graphs, fitting = options.cuda_graphs, Fitting(None if budget is None else "auto", budget)
    settings = EngineSettings(work, lambda step: LEARNING_RATE, fitting=fitting, cuda_graphs=graphs)
    lora = resolve_lora(LoraConfig.from_dict(ALL), config)
    size = largest_exchange(config, lora, mesh.tp.size, work.tokens, torch.bfloat16, device)
    exchange, _ = choose_exchange(None, mesh, sp, device, size)
    base = BaseFormat(options.base_format)
    place = Placement(mesh.tp, sp, torch.bfloat16, device, exchange, base=base, cp=mesh.cp)
    engine = build_trainer(config, mesh, lora, place, settings, randomize)
    fit, data = engine.cut.fit, Step(1, length, config.vocab_size, False, device)
    if mesh.cp.size > 1:
        data.microbatches = [cut_batch(batch, mesh.cp.rank, mesh.cp.size) for batch in data.microbatches]
    seconds, loss, peak = [], 0.0, 0
    for number in range(options.warmup + options.steps):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = engine.trainer.step(number, data).loss
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        # Of all steps: what graphs hold is not counted as allocated, but the first step runs without.
        peak = max(peak, torch.cuda.max_memory_allocated() - before)
    reserved = torch.cuda.max_memory_reserved() - reserved
    engine.trainer.close()
    median = statistics.median(seconds[options.warmup :])
    again = fit.words(range(config.num_hidden_layers))
    return [
        f"{length:,}", str(config.num_hidden_layers), again, f"{median:.3f}",
        f"{length / median / mesh.world_size:,.0f}",
        f"{peak / GIB:.2f}", f"{fit.memory.total / GIB:.2f}", f"{fit.memory.total / peak - 1:+.1%}",
        f"{reserved / GIB:.2f}", f"{fit.host / GIB:.1f}", f"{loss:.4f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--memory", type=float, default=76.0, help="GiB that recompute auto may take")
    parser.add_argument("--host", type=float, default=100.0, help="GiB of host memory that it may take")
    parser.add_argument("--recompute", default="auto", help="auto, or one of choices.RECOMPUTE_LEVELS")
    parser.add_argument("--base_format", default="dense", choices=("dense", *BASE_FORMATS))
    parser.add_argument("--cp", type=int, default=1, help="context_parallel_size, under torchrun")
    parser.add_argument("--tp", type=int, default=1, help="tensor_parallel_size, under torchrun")
    parser.add_argument("--layers", type=int, help="of the model; default: all")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--no_cuda_graphs", dest="cuda_graphs", action="store_const", const=False)
    parser.add_argument("--output", type=Path, help="JSON file for the result, as in benchmarks/results/")
    options = parser.parse_args()
    fields, device, rows = read_fields(options.model), torch.device("cuda", environment_int("LOCAL_RANK", 0)), []
    with distributed(device, options.tp, 1, cp=options.cp) as mesh:
        run(fields, options, device, mesh, rows)


def run(
    fields: dict, options: argparse.Namespace, device: torch.device, mesh: ParallelMesh, rows: list[list[str]]
) -> None:
    """Measure every length; the first rank prints."""
    if mesh.rank:
        for length in options.lengths:
            measured(fields, length, options, device, mesh)
        return
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    for length in options.lengths:
        try:
            rows.append(measured(fields, length, options, device, mesh))
        except torch.OutOfMemoryError:
            rows.append([f"{length:,}", "", "out of memory", *[""] * (len(COLUMNS) - 3)])
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if options.output:
        about = f"One row a step, all linears r 16, bfloat16, at most {options.memory:g} GiB by the plan."
        record(options.output, "Long rows", about, where_of(device), COLUMNS, rows, {"options": vars(options)})


if __name__ == "__main__":
    main()
