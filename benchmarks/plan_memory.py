"""Memory as `megalora plan` predicts it against torch.cuda.max_memory_allocated, over whole training steps on a GPU.

    python benchmarks/plan_memory.py --model CONFIG.json

The model has the shape of a config.json and random weights, and runs through the trainer of a run: three steps of one
microbatch for each setting, the settings one after another. 2048 tokens a row, all labelled, bfloat16.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from types import SimpleNamespace

import torch
from train_step import Step, ours

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.models.config import config_from_dict
from megalora.planning.memory import stage_memory
from megalora.planning.nodes import Workload
from megalora.planning.shapes import shape_of

QV = {"r": 64, "lora_alpha": 128, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
ALL = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"}
SETTINGS = [
    ("q,v r 64", QV, 1, "none"),
    ("q,v r 64", QV, 2, "selective"),
    ("q,v r 64", QV, 8, "full"),
    ("q,v r 64", QV, 4, "none"),
    ("all r 16", ALL, 1, "full"),
    ("all r 16", ALL, 2, "none"),
    ("all r 16", ALL, 4, "selective"),
    ("all r 16", ALL, 4, "none"),
    ("all r 16", ALL, 8, "full"),
]
LENGTH, STEPS, GIB = 2048, 3, 2**30


class RandomWeights(dict):
    """Every tensor of the model by its name, made when it is asked for and not kept."""

    def __init__(self, fields: dict, lora: dict, device: torch.device):
        super().__init__()
        config = config_from_dict(fields)
        self._shapes, self._rank, self._device = config.tensors, lora["r"], device

    def __missing__(self, name: str) -> torch.Tensor:
        shape = self._shapes.get(name)
        linear, _, factor = name.removesuffix(".weight").rpartition(".")
        if factor in ("lora_A", "lora_B"):
            out, inputs = self._shapes[f"{linear}.weight"]
            shape = (self._rank, inputs) if factor == "lora_A" else (out, self._rank)
        return torch.randn(shape or self._shapes["model.embed_tokens.weight"], device=self._device) * 0.02


def measured(fields: dict, lora: dict, rows: int, recompute: str, device: torch.device) -> tuple[int, float]:
    """(most bytes allocated during the last of STEPS steps, its seconds)."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    data = Step(rows, LENGTH, fields["vocab_size"], False, device)
    weights, options = RandomWeights(fields, lora, device), SimpleNamespace(recompute=recompute, cuda_graphs=False)
    step = ours(weights, fields, lora, data, torch.bfloat16, options)
    for _ in range(STEPS):
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return torch.cuda.max_memory_allocated() - before, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="config.json")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the settings to run, from 0")
    options = parser.parse_args()
    with open(options.model, encoding="utf-8") as file:
        fields = json.load(file)
    config, device = config_from_dict(fields), torch.device("cuda")
    print("| adapters | rows | recompute | predicted, GiB | measured, GiB | off by |\n|---|---|---|---|---|---|")
    chosen = SETTINGS if options.only is None else [SETTINGS[i] for i in options.only]
    for name, lora, rows, recompute in chosen:
        shape = shape_of(config, resolve_lora(LoraConfig.from_dict(lora), config), 1)
        work = Workload(rows, LENGTH, recompute=recompute)
        layers = [range(config.num_hidden_layers)]
        predicted = stage_memory(shape, layers, work, first=True, last=True).total
        try:
            bytes_, _ = measured(fields, lora, rows, recompute, device)
        except torch.cuda.OutOfMemoryError:
            print(f"| {name} | {rows} | {recompute} | {predicted / GIB:.2f} | more than there is | |", flush=True)
            continue
        line = f"| {name} | {rows} | {recompute} | {predicted / GIB:.2f} | {bytes_ / GIB:.2f} "
        print(f"{line}| {predicted / bytes_ - 1:+.1%} |", flush=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
