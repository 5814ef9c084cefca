"""Greedy decoding, megalora against transformers' generate, in turn on the same prompts and weights.

    OMP_NUM_THREADS=2 python benchmarks/generate.py --model models/SmolLM2-135M-Instruct             # CPU
    python benchmarks/generate.py --model CONFIG.json --prompts 32 --peer one_by_one batched         # GPU, bfloat16

Prompts are random ids of several lengths, others in each run; every reply has exactly --new_tokens. The first case is
one prompt; the second, all --prompts in one go, against transformers one by one or in batches of left-padded prompts.
The bound of one prompt is reading the weights and the cache once a token: at the bandwidth that this run measures, or
--bandwidth. Prints a table, and writes JSON with --output. --r gives both an adapter on all linears (0: none).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from common import add_machine, add_model, build_base, machine, read_fields, record, where_of
from train_step import build_peer, plain_weights

from megalora.adapters.config import LoraConfig
from megalora.building import build_stage, load_adapter, resolve_lora
from megalora.generation.replica import Replica
from megalora.generation.requests import Prompt
from megalora.generation.sampling import Sampling
from megalora.models.config import config_from_dict
from megalora.models.stage import NO_LORA, Stage
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.placement import Placement

Prompts = list[list[int]]
Generate = Callable[[Prompts], list[list[int]]]
OURS = "megalora"


def build_ours(weights: dict[str, torch.Tensor], fields: dict, lora: dict | None, dtype, device) -> Stage:
    config = config_from_dict(fields)
    resolved = NO_LORA if lora is None else resolve_lora(LoraConfig.from_dict(lora), config)
    mesh = ParallelMesh()
    stage, _ = build_stage(config, mesh, resolved, Placement(mesh.tp, False, dtype, device))
    for name, parameter in stage.named_parameters():
        if not parameter.requires_grad:
            parameter.data.copy_(weights[name])
    load_adapter(stage, {name: weights[name] for name in stage.trainable()}, "of the benchmark")
    return stage


def ours(replica: Replica, new_tokens: int) -> Generate:
    def generate(prompts: Prompts) -> list[list[int]]:
        asked = [Prompt(number, ids) for number, ids in enumerate(prompts)]
        return [list(reply.token_ids) for reply in replica.replies(asked, new_tokens)]

    return generate


def peer(model: torch.nn.Module, new_tokens: int, batch: int, device) -> Generate:
    """transformers' generate over batches of left-padded prompts."""

    @torch.inference_mode()
    def generate(prompts: Prompts) -> list[list[int]]:
        replies = []
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            longest = max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in part], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device=device)
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                do_sample=False, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
            replies += out[:, longest:].tolist()
        return replies

    return generate


def bytes_a_token(stage: Stage, length: int) -> int:
    """What one token of one sequence must read: every weight of the layers and the head, and `length` cached tokens."""
    config = stage.config
    read = [stage.head.weight, *(p for name, p in stage.named_parameters() if "norm" in name)]
    weights = sum(x.numel() * x.element_size() for x in read) + sum(group.matrix.nbytes for group in stage.groups)
    cache = 2 * config.num_hidden_layers * config.attention.kv_heads * config.head_dim * length
    return weights + cache * stage.place.dtype.itemsize


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a sum over 1 GiB, the best of ten."""
    x = torch.ones(2**28, device=device)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    return x.numel() * 4 / best


def in_turn(
    contenders: dict[str, Generate], runs: list[Prompts], warmup: int
) -> tuple[dict[str, list[float]], dict[str, list]]:
    """(seconds of each contender's runs, its last replies); the first `warmup` runs do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    replies = {}
    for i, prompts in enumerate(runs):
        for name, generate in contenders.items():
            gc.collect()
            start = time.perf_counter()
            replies[name] = generate(prompts)  # lists on the host: the device has ended
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds, replies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    add_machine(parser)
    parser.add_argument("--prompts", type=int, default=64, help="of the second case; 0 leaves it out")
    parser.add_argument("--prompt_tokens", type=int, nargs=2, default=(16, 64), help="shortest and longest")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--peer", nargs="*", choices=("one_by_one", "batched"), default=["one_by_one"])
    parser.add_argument("--r", type=int, default=0)
    parser.add_argument("--bandwidth", type=float, help="GB/s of the bound (default: measured)")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.recompute = "none"  # of build_peer
    device, dtype = machine(options)
    fields = read_fields(options.model)
    lora = {"r": options.r, "lora_alpha": 16, "target_modules": "all-linear"} if options.r else None
    if lora is None:
        model = build_base(fields, dtype, device, options.model).eval()
    else:
        model = build_peer(fields, lora, dtype, device, options).eval()
    stage = build_ours(plain_weights(model), fields, lora, dtype, device)
    low, high = options.prompt_tokens
    generator = torch.Generator().manual_seed(0)

    def prompts(count: int) -> Prompts:
        lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
        return [torch.randint(9, fields["vocab_size"], (n,), generator=generator).tolist() for n in lengths]

    context = high + options.new_tokens
    replica = Replica(stage, ParallelMesh().pp, ParallelMesh().tp, context, Sampling(), ())

    cases = {"1 prompt": (1, {"transformers": 1})}
    if options.prompts:
        peers = {"one_by_one": ("transformers one by one", 1), "batched": ("transformers batched", options.prompts)}
        cases[f"{options.prompts} prompts"] = (options.prompts, dict(peers[name] for name in options.peer))
    measured, rows = {}, []
    for case, (count, peers) in cases.items():
        contenders = {OURS: ours(replica, options.new_tokens)}
        contenders |= {name: peer(model, options.new_tokens, batch, device) for name, batch in peers.items()}
        runs = [prompts(count) for _ in range(options.warmup + options.repeats)]
        seconds, replies = in_turn(contenders, runs, options.warmup)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        tokens = count * options.new_tokens
        for name, median in medians.items():
            same = sum(a == b for a, b in zip(replies[name], replies[OURS], strict=True))
            ratio = median / medians[OURS]
            note = "" if name == OURS else f"  ours is {ratio:.2f}x, {same} of {count} replies equal"
            spread = f"{min(seconds[name]):.3f} .. {max(seconds[name]):.3f} s"
            print(f"{case:12s} {name:24s} {tokens / median:9.1f} tokens/s  ({spread}){note}", flush=True)
            rows.append((case, name, f"{tokens / median:.1f}", f"{ratio:.2f}", f"{same} of {count}"))
        measured[case] = {"seconds": seconds, "tokens": tokens, "medians": medians}

    read = bytes_a_token(stage, (low + high + options.new_tokens) // 2)
    bandwidth = options.bandwidth * 1e9 if options.bandwidth else read_bandwidth(device)
    reached = read * options.new_tokens / measured["1 prompt"]["medians"][OURS]
    print(
        f"1 prompt: {read / 1e6:.0f} MB a token at {bandwidth / 1e9:.1f} GB/s bound it to {bandwidth / read:.1f} "
        f"tokens/s; ours is at {reached / bandwidth:.0%} of that, prompt and all"
    )
    where = where_of(device)
    print(f"{where}, {dtype}, torch {torch.__version__}, r {options.r}")
    if options.output:
        about = f"Greedy, {dtype}, prompts of {low} to {high} tokens, {options.new_tokens} new tokens, r {options.r}."
        columns = ("case", "contender", "tokens/s", "times ours", "equal replies")
        figures = {"options": vars(options), "cases": measured, "bytes_a_token": read, "bandwidth": bandwidth}
        record(options.output, "Generation", about, where, columns, rows, figures)


if __name__ == "__main__":
    main()
