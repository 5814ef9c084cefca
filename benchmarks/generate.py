"""Greedy decoding, megalora against transformers' generate, in turn on the same prompts and weights.

    OMP_NUM_THREADS=2 python benchmarks/generate.py --model models/SmolLM2-135M-Instruct             # CPU
    python benchmarks/generate.py --model CONFIG.json --prompts 32 --peer one_by_one batched         # GPU, bfloat16
    python benchmarks/generate.py --model CONFIG.json --prompts 32 --peer none --base_format dense fp8 nf4

Prompts are random ids of several lengths, others in each run; every reply has exactly --new_tokens. The first case is
one prompt; the second, all --prompts in one go, against transformers one by one or in batches of left-padded prompts.
The bound of one prompt is reading the weights and the cache once a token: at the bandwidth that this run measures, or
--bandwidth. Prints a table, and writes JSON with --output. --r gives both an adapter on all linears (0: none).
Each --base_format is a contender of ours, all on the same prompts. With --peer none there is no model of transformers,
and the weights are random: `--base_format nf4 --peer none` runs where the 16-bit model would not fit. GiB, on a GPU:
what a contender keeps (model and cache), and the most that it took, loading included.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from common import add_machine, add_model, build_base, machine, read_fields, record, where_of
from train_step import CONTENDERS, build_peer, filled, plain_weights

from megalora.adapters.config import LoraConfig
from megalora.building import build_stage, resolve_lora
from megalora.generation.replica import Replica
from megalora.generation.requests import Prompt
from megalora.generation.sampling import Sampling
from megalora.models.config import config_from_dict
from megalora.models.stage import NO_LORA, Stage
from megalora.parallel.formats import BaseFormat
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.placement import Placement

Prompts = list[list[int]]
Generate = Callable[[Prompts], list[list[int]]]
OURS = {"dense": CONTENDERS["ours"], **{name: CONTENDERS[name] for name in ("fp8", "nf4", "nf4_fp8")}}


class Memory:
    """GiB that each contender keeps and at most takes, of one GPU; nothing on a CPU."""

    def __init__(self, device: torch.device):
        self._on = device.type == "cuda"
        self.keeps: dict[str, float] = {}
        self.peak: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """A context in which what is allocated is the contender's."""
        if not self._on:
            yield
            return
        torch.cuda.reset_peak_memory_stats()
        before, kept = torch.cuda.memory_allocated(), self.keeps.get(name, 0.0)
        yield
        self.keeps[name] = kept + (torch.cuda.memory_allocated() - before) / 2**30
        took = kept + (torch.cuda.max_memory_allocated() - before) / 2**30
        self.peak[name] = max(self.peak.get(name, 0.0), took)

    def shown(self, name: str) -> tuple[str, str]:
        return tuple(f"{each[name]:.1f}" if name in each else "" for each in (self.keeps, self.peak))


def build_ours(
    weights: dict[str, torch.Tensor] | None, fields: dict, lora: dict | None, base_format: str, dtype, device
) -> Stage:
    """Our model; weights None: random ones."""
    config = config_from_dict(fields)
    resolved = NO_LORA if lora is None else resolve_lora(LoraConfig.from_dict(lora), config)
    mesh = ParallelMesh()
    place = Placement(mesh.tp, False, dtype, device, base=BaseFormat(base_format))
    stage, _ = build_stage(config, mesh, resolved, place)
    filled(weights)(stage)
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
    """What one token of one sequence must move: it reads every weight of the layers and the head, and `length` cached
    tokens of layers of attention; states of linear attention are read and written."""
    read = [stage.head.weight, *(p for name, p in stage.named_parameters() if "norm" in name)]
    weights = sum(x.numel() * x.element_size() for x in read) + sum(group.matrix.nbytes for group in stage.groups)
    cache = sum(2 * block.kv_heads * block.spec.head_dim * length for block in stage.attentions)
    like = torch.empty(0, dtype=stage.place.dtype, device="meta")
    states = sum(2 * one.nbytes for block in stage.recurrent for one in block.nothing(1, like))
    return weights + cache * stage.place.dtype.itemsize + states


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
    contenders: dict[str, Generate], runs: list[Prompts], warmup: int, memory: Memory
) -> tuple[dict[str, list[float]], dict[str, list]]:
    """(seconds of each contender's runs, its last replies); the first `warmup` runs do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    replies = {}
    for i, prompts in enumerate(runs):
        for name, generate in contenders.items():
            gc.collect()
            with memory.of(name):
                start = time.perf_counter()
                replies[name] = generate(prompts)  # lists on the host: the device has ended
                elapsed = time.perf_counter() - start
            if i >= warmup:
                seconds[name].append(elapsed)
    return seconds, replies


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    add_machine(parser)
    parser.add_argument("--base_format", nargs="+", choices=tuple(OURS), default=["dense"], help="of ours, one each")
    parser.add_argument("--prompts", type=int, default=64, help="of the second case; 0 leaves it out")
    parser.add_argument("--prompt_tokens", type=int, nargs=2, default=(16, 64), help="shortest and longest")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--peer", nargs="*", choices=("one_by_one", "batched", "none"), default=["one_by_one"])
    parser.add_argument("--r", type=int, default=0)
    parser.add_argument("--bandwidth", type=float, help="GB/s of the bound (default: measured)")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if "none" in options.peer and len(options.peer) > 1:
        parser.error("--peer none names none beside others: give none alone, or the others")
    options.recompute = "none"  # of build_peer
    return options


def build_all(options, fields: dict, dtype, device, memory: Memory) -> tuple[dict[str, Stage], torch.nn.Module | None]:
    """Ours by contender, and transformers' model with the same weights, or None."""
    lora = {"r": options.r, "lora_alpha": 16, "target_modules": "all-linear"} if options.r else None
    model = weights = None
    if options.peer != ["none"]:
        if lora is None:
            model = build_base(fields, dtype, device, options.model).eval()
        else:
            model = build_peer(fields, lora, dtype, device, options).eval()
        weights = plain_weights(model)
    stages = {}
    for base_format in options.base_format:
        with memory.of(OURS[base_format]):
            stages[OURS[base_format]] = build_ours(weights, fields, lora, base_format, dtype, device)
    return stages, model


def cases_of(options) -> dict[str, tuple[int, dict[str, int]]]:
    """(prompts, the batch of each peer) of each case."""
    cases = {"1 prompt": (1, {"transformers": 1})}
    if options.prompts:
        peers = {"one_by_one": ("transformers one by one", 1), "batched": ("transformers batched", options.prompts)}
        named = dict(peers[name] for name in options.peer if name != "none")
        cases[f"{options.prompts} prompts"] = options.prompts, named
    return {case: (count, {} if options.peer == ["none"] else peers) for case, (count, peers) in cases.items()}


def main() -> None:
    options = parse()
    device, dtype = machine(options)
    fields = read_fields(options.model)
    memory = Memory(device)
    stages, model = build_all(options, fields, dtype, device, memory)
    low, high = options.prompt_tokens
    words = config_from_dict(fields).vocab_size
    generator = torch.Generator().manual_seed(0)

    def prompts(count: int) -> Prompts:
        lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
        return [torch.randint(9, words, (n,), generator=generator).tolist() for n in lengths]

    context, mesh = high + options.new_tokens, ParallelMesh()
    replicas = {}
    for name, stage in stages.items():
        with memory.of(name):
            replicas[name] = Replica(stage, mesh.pp, mesh.tp, context, Sampling(), ())

    first = next(iter(stages))  # what the others are compared with
    measured, rows = {}, []
    for case, (count, peers) in cases_of(options).items():
        contenders = {name: ours(replica, options.new_tokens) for name, replica in replicas.items()}
        contenders |= {name: peer(model, options.new_tokens, batch, device) for name, batch in peers.items()}
        runs = [prompts(count) for _ in range(options.warmup + options.repeats)]
        seconds, replies = in_turn(contenders, runs, options.warmup, memory)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        tokens = count * options.new_tokens
        for name, median in medians.items():
            same = sum(a == b for a, b in zip(replies[name], replies[first], strict=True))
            ratio, gib = median / medians[first], memory.shown(name)
            note = "" if name == first else f"  {first} is {ratio:.2f}x, {same} of {count} replies equal"
            note += f", keeps {gib[0]} GiB, at most {gib[1]}" if name in stages and all(gib) else ""
            spread = f"{min(seconds[name]):.3f} .. {max(seconds[name]):.3f} s"
            print(f"{case:12s} {name:24s} {tokens / median:9.1f} tokens/s  ({spread}){note}", flush=True)
            gib = gib if name in stages else ("", "")
            rows.append((case, name, f"{tokens / median:.1f}", f"{ratio:.2f}", f"{same} of {count}", *gib))
        measured[case] = {"seconds": seconds, "tokens": tokens, "medians": medians}

    bandwidth = options.bandwidth * 1e9 if options.bandwidth else read_bandwidth(device)
    reads = {}
    for name, stage in stages.items():
        read = reads[name] = bytes_a_token(stage, (low + high + options.new_tokens) // 2)
        reached = read * options.new_tokens / measured["1 prompt"]["medians"][name]
        print(
            f"1 prompt, {name}: {read / 1e6:.0f} MB a token at {bandwidth / 1e9:.1f} GB/s bound it to "
            f"{bandwidth / read:.1f} tokens/s; it is at {reached / bandwidth:.0%} of that, prompt and all"
        )
    where = where_of(device)
    print(f"{where}, {dtype}, torch {torch.__version__}, r {options.r}")
    if options.output:
        about = f"Greedy, {dtype}, prompts of {low} to {high} tokens, {options.new_tokens} new tokens, r {options.r}."
        columns = ("case", "contender", "tokens/s", f"time / {first}'s", "equal replies", "GiB kept", "GiB at most")
        figures = {"options": vars(options), "cases": measured, "bytes_a_token": reads, "bandwidth": bandwidth}
        figures |= {"gib_kept": memory.keeps, "gib_at_most": memory.peak}
        record(options.output, "Generation", about, where, columns, rows, figures)


if __name__ == "__main__":
    main()
