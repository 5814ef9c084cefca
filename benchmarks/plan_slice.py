"""One rank of a large model's layout on one GPU: its compute time and memory beside what `megalora plan` predicts.

    python benchmarks/plan_slice.py --model CONFIG.json --tp 8 --pp 2 --stage 0

The rank's tensor-parallel and pipeline neighbours do not exist: a fake process group takes their messages at once and
gives back the rank's own (so that experts have tokens to choose from), and what is timed is the rank's own compute.
Random weights, 2048 tokens a row, all labelled, bfloat16, LoRA r = 16 on all linears. Microbatches run one after
another, forward then backward, and forwards ahead of backwards as many as 1F1B keeps in flight on that stage.
`--layers N` takes so many layers in place of the configuration's, and of a model that begins with dense layers one
dense layer and N - 1 with experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from train_step import randomize

from megalora.adapters.config import LoraConfig
from megalora.batch import Batch
from megalora.building import resolve_lora
from megalora.choices import BASE_FORMATS
from megalora.models.config import config_from_dict
from megalora.models.inputs import training_inputs
from megalora.models.stage import Stage
from megalora.optimizer import AdapterOptimizer
from megalora.parallel import collectives
from megalora.parallel.formats import BaseFormat
from megalora.parallel.grads import FlatGradients
from megalora.parallel.mesh import Axis, ParallelMesh
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits
from megalora.pipeline.partition import partition
from megalora.pipeline.schedule import SCHEDULES
from megalora.planning.devices import device_of
from megalora.planning.memory import stage_memory
from megalora.planning.nodes import Workload
from megalora.planning.shapes import shape_of
from megalora.planning.timing import chunk_seconds, layer_costs

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"}
LENGTH, GIB = 2048, 2**30


class Slice:
    """One rank's stage with its gradients and optimizer, on the GPU."""

    def __init__(self, fields: dict, options: argparse.Namespace, parts: list[range], work: Workload, device: str):
        self.config, self.device = config_from_dict(fields), torch.device(device)
        lora = resolve_lora(LoraConfig.from_dict(LORA), self.config)
        tp = Axis(0, tuple(range(options.tp)), dist.group.WORLD if options.tp > 1 else None)
        self.first, self.last = options.stage == 0, options.stage == options.pp - 1
        base = BaseFormat(options.base_format)
        place = Placement(tp, work.sequence_parallel, torch.bfloat16, self.device, base=base)
        self.stage = Stage(
            self.config,
            parts[options.stage],
            place,
            lora,
            first=self.first,
            last=self.last,
            recompute=work.recompute,
        )
        with torch.no_grad():
            randomize(self.stage)
        parameters = self.stage.trainable()
        self.gradients = FlatGradients(parameters, named_splits(self.stage), ParallelMesh(tp=tp))
        self.optimizer = AdapterOptimizer(parameters)
        tokens = work.tokens
        ids = torch.randint(0, self.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
        rows = torch.arange(options.rows + 1, dtype=torch.int32) * LENGTH
        positions = torch.arange(LENGTH).repeat(options.rows)
        self.batch = Batch(ids, ids.roll(-1), positions, rows, torch.arange(tokens))
        self.hidden = (tokens // options.tp if work.sequence_parallel else tokens), self.config.hidden_size

    def forward(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(what came in, what goes out) of a microbatch."""
        inputs = training_inputs(self.batch, self.config, self.stage.place, seed=0, step=0)
        entered = None
        if not self.first:
            entered = torch.randn(self.hidden, device=self.device, dtype=torch.bfloat16).requires_grad_()
        return entered, self.stage(entered, inputs)

    def backward(self, out: torch.Tensor) -> None:
        out.backward(None if self.last else torch.randn_like(out))

    def step(self, microbatches: int, ahead: int) -> tuple[list[float], list[float]]:
        """A step of 1F1B with `ahead` in flight. (ms of each forward, of each backward)."""
        self.stage.refresh_adapters()
        self.gradients.zero()
        waiting, times = [], {"forward": [], "backward": []}

        def timed(name: str, work):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = work()
            end.record()
            times[name].append((start, end))
            return result

        for _ in range(microbatches):
            waiting.append(timed("forward", self.forward))
            if len(waiting) == ahead:
                entered, out = waiting.pop(0)
                timed("backward", lambda out=out: self.backward(out))
                del entered, out
        while waiting:
            entered, out = waiting.pop(0)
            timed("backward", lambda out=out: self.backward(out))
            del entered, out
        self.optimizer.step(1e-4)
        torch.cuda.synchronize()
        return tuple([a.elapsed_time(b) for a, b in times[name]] for name in ("forward", "backward"))

    def busy(self) -> tuple[float, float]:
        """(ms of the kernels of one forward, of one backward): what a step takes that is replayed from CUDA graphs."""
        self.gradients.zero()
        found = []
        _, out = self.forward()
        for work in (self.forward, lambda: self.backward(out)):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                work()
                torch.cuda.synchronize()
            kernels = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
            found.append(sum(event.device_time_total for event in kernels) / 1e3)
        return found[0], found[1]


def own_part(out: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Stand for reduce_scatter where the other ranks have nothing to add."""
    out.copy_(x[: len(out)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="config.json")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--base_format", default="dense", choices=("dense", *BASE_FORMATS))
    parser.add_argument("--layers", type=int, help="of the model; default: all")
    parser.add_argument("--microbatches", type=int, default=6)
    options = parser.parse_args()
    with open(options.model, encoding="utf-8") as file:
        fields = json.load(file)
    if options.layers:
        fields["num_hidden_layers"] = options.layers
        if fields.get("first_k_dense_replace"):
            fields["first_k_dense_replace"] = 1
    config, device = config_from_dict(fields), device_of(torch.device("cuda"))
    if options.tp > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.tp)
        collectives._reduce_scatter_single = own_part  # of the fake group it is whatever lay in memory
    work = Workload(
        options.rows,
        LENGTH,
        sequence_parallel=options.tp > 1,
        recompute=options.recompute,
        base_format=options.base_format,
    )
    shape = shape_of(config, resolve_lora(LoraConfig.from_dict(LORA), config), options.tp)
    costs = layer_costs(shape, work, device)
    parts = partition("cost", costs.layers, options.pp, first_cost=costs.first, last_cost=costs.last)
    ends = {"first": options.stage == 0, "last": options.stage == options.pp - 1}
    ahead = SCHEDULES["1f1b"].peak(options.stage, options.pp, options.microbatches).activations
    memory = stage_memory(shape, [parts[options.stage]], work, in_flight=ahead, **ends)
    alone = Slice(fields, options, parts, work, "cuda")
    for _ in range(2):
        alone.step(options.microbatches, ahead)
    torch.cuda.reset_peak_memory_stats()
    forward, backward = alone.step(options.microbatches, ahead)
    peak = torch.cuda.max_memory_allocated()
    busy = alone.busy()

    # Without the collectives, whose messages are not sent here.
    never = float("inf")
    silent = replace(device, link=never, network=never, collective=never, latency=0.0, meeting=0.0, overlaps=False)
    predicted = chunk_seconds(shape, parts[options.stage], work, silent, **ends)
    replayed = chunk_seconds(shape, parts[options.stage], work, silent.with_graphs(), **ends)
    whole = chunk_seconds(shape, parts[options.stage], work, device, **ends)
    layers = parts[options.stage]
    where = f"tp {options.tp}, pp {options.pp}, stage {options.stage} (layers {layers[0]} to {layers[-1]})"
    print(f"{where}, {options.rows} rows, recompute {options.recompute}, base {options.base_format}, {ahead} in flight")
    print("| | predicted | measured |\n|---|---|---|")
    print(f"| memory, GiB | {memory.total / GIB:.2f} | {peak / GIB:.2f} |")
    for name, times, measured in (
        ("forward", predicted, statistics.median(forward)),
        ("backward", predicted, statistics.median(backward)),
        ("forward, its kernels alone", replayed, busy[0]),
        ("backward, its kernels alone", replayed, busy[1]),
    ):
        seconds = times.forward if name.startswith("forward") else times.recompute + times.backward
        print(f"| {name}, ms a microbatch | {1e3 * seconds:.1f} | {measured:.1f} |")
    print(f"the collectives are predicted to add {1e3 * (whole.total - predicted.total):.1f} ms")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
