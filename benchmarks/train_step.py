"""One training step, megalora against transformers + peft, on the same tokens.

    OMP_NUM_THREADS=2 python benchmarks/train_step.py                    # CPU: the shape of SmolLM2-135M
    python benchmarks/train_step.py --model CONFIG.json --seq_length 2048 --labels all --r 16 --dropout 0.1 \
        --target_modules all-linear                                      # GPU, bfloat16

The model is the shape of a config.json with random weights (an HF folder with weights gives its own). Each row is one
document. A step is zero_grad, forward, backward, gradient clipping and AdamW. Contenders: ours; fp8, nf4 and nf4_fp8,
ours on a base in 8 or 4 bits; plain, ours without --use_dora; peft, eager with torch's own choice of attention; liger,
the same with Liger's kernels and cuDNN's attention (where liger_kernel is installed). On a CPU they make their steps in
turn and on the same weights; on a GPU one runs after the other, each with the memory to itself, unless --at_once has
them all there and their steps in turn. Prints the median of each, its peak memory on a GPU (what its tensors took,
and what torch has reserved for them), and how much faster ours is; --output writes JSON. Bases in 8 or 4 bits hold one
linear at a time in 16 bits while they are filled: `--contenders nf4` runs where the 16-bit model does not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from common import add_machine, add_model, build_base, fill_quantised, machine, read_fields, record, where_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalora.adapters.config import LoraConfig
from megalora.batch import Batch
from megalora.building import Cut, EngineSettings, build_trainer, load_adapter, resolve_lora
from megalora.models.config import config_from_dict
from megalora.models.spec import ModelSpec
from megalora.models.stage import Stage
from megalora.parallel.formats import BaseFormat
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits
from megalora.planning.nodes import Workload
from megalora.training import Trainer

LEARNING_RATE = 1e-4
CONTENDERS = {
    "ours": "megalora",
    "fp8": "megalora, base in fp8",
    "nf4": "megalora, base in nf4",
    "nf4_fp8": "megalora, base in nf4, multiplied in fp8",
    "plain": "megalora, plain LoRA",
    "peft": "transformers + peft",
    "liger": "the same + Liger + cuDNN",
}
COLUMNS = ("contender", "seconds, median", "tokens/s", "GiB allocated", "GiB reserved")


class Step:
    """The tokens of every step: one microbatch of `rows` documents; labels on all of a row or on its last half."""

    def __init__(self, rows: int, length: int, vocab_size: int, half: bool, device: torch.device):
        ids = torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        if half:
            labels[:, : length // 2] = -100
        shifted = torch.full_like(labels, -100)
        shifted[:, :-1] = labels[:, 1:]
        self.ids, self.labels = ids.to(device), labels.to(device)
        self.microbatches = [
            Batch(
                input_ids=ids.flatten(),
                labels=shifted.flatten(),
                position_ids=torch.arange(length).repeat(rows),
                cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * length,
                token_index=torch.arange(rows * length),
            )
        ]
        self.label_count = int((shifted != -100).sum())
        self.token_count = rows * length

    @property
    def read(self) -> dict[str, Any]:
        """The arguments of transformers' model."""
        return {"input_ids": self.ids, "labels": self.labels, "use_cache": False}


def make_trainer(
    config: ModelSpec,
    mesh: ParallelMesh,
    lora: dict,
    place: Placement,
    work: Workload,
    fill: Callable[[Stage], None],
    *,
    partition_method: str = "uniform",
    schedule: str = "1f1b",
    chunks: int = 1,
    cuda_graphs: bool | None = None,
) -> tuple[Trainer, Cut]:
    """This rank's trainer, as finetune makes it, and the cut into stages. fill gives its stage weights."""
    settings = EngineSettings(
        work,
        lambda step: LEARNING_RATE,
        partition_method=partition_method,
        schedule=schedule,
        chunks=chunks,
        cuda_graphs=cuda_graphs,
    )
    engine = build_trainer(config, mesh, resolve_lora(LoraConfig.from_dict(lora), config), place, settings, fill)
    return engine.trainer, engine.cut


def ours(
    weights: dict[str, torch.Tensor] | None,
    fields: dict,
    lora: dict,
    data: Step,
    dtype: torch.dtype,
    options,
    base_format: str = "dense",
):
    """A function that makes one step of ours and returns its loss; weights None: random ones."""
    mesh = ParallelMesh()
    trainer, _ = make_trainer(
        config_from_dict(fields),
        mesh,
        lora,
        Placement(mesh.tp, False, dtype, data.ids.device, base=BaseFormat(base_format)),
        Workload(*data.ids.shape, element=dtype.itemsize, recompute=options.recompute, base_format=base_format),
        filled(weights),
        cuda_graphs=vars(options).get("cuda_graphs"),
    )
    count = iter(range(10**9))
    return lambda: trainer.step(next(count), data).loss


def filled(weights: Mapping[str, torch.Tensor] | None) -> Callable[[Stage], None]:
    """A function that gives a stage `weights`, quantised where its base is; None: random ones."""

    def fill(stage: Stage) -> None:
        if weights is None:
            randomize(stage)
            return
        splits = named_splits(stage)  # rows of several outputs may lie in another order than a file's
        for name, parameter in stage.named_parameters():
            if not parameter.requires_grad:
                parameter.data.copy_(splits[name].slice(weights[name]))
        fill_quantised(stage, weights)
        load_adapter(stage, {name: weights[name] for name in stage.trainable()}, "of the benchmark")

    return fill


@torch.no_grad()
def randomize(stage: Stage) -> None:
    """Weights as an untrained model has them, and a B that is not zero."""
    torch.manual_seed(0)
    for name, parameter in stage.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.normal_(std=0.02)
    fill_quantised(stage)


def peers(
    model: torch.nn.Module, read: Mapping[str, Any], attention: Callable = contextlib.nullcontext
) -> Callable[[], float]:
    """A function that makes one step of transformers + peft and returns its loss. read: what the model is given."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        with attention():
            loss = model(**read).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def cudnn_attention() -> contextlib.AbstractContextManager:
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(backends, set_priority=True)


def with_liger(model: torch.nn.Module) -> torch.nn.Module:
    """Liger's kernels in place of the model's own, as transformers' Trainer puts them there."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model.get_base_model())
    return model


def build_peer(fields: dict, lora: dict, dtype: torch.dtype, device: torch.device, options) -> torch.nn.Module:
    """The peft model, with a B that is not zero; random weights unless --model names a folder with some."""
    import peft

    model = build_base(fields, dtype, device, options.model)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    model.train()
    if options.recompute == "full":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    draw_b(model)
    return model


def draw_b(model: torch.nn.Module) -> None:
    """A B that is not zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)


def measure(steps: dict[str, Callable[[], float]], device: torch.device, warmup: int, count: int) -> dict[str, dict]:
    """Seconds of each step after `warmup` of them, made in turn, and CPU seconds of all threads; the first loss; peak
    memory in GiB on a GPU, reserved (peak_gib) and allocated."""
    nothing = {"loss": None, "peak_gib": None, "allocated_gib": None}
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "cpu_seconds": [], **nothing} for name in steps}
    for i in range(warmup + count):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start, busy = time.perf_counter(), time.process_time()
            loss = step()  # its value is read on the host
            if device.type == "cuda":
                torch.cuda.synchronize()
            elapsed, busy = time.perf_counter() - start, time.process_time() - busy
            result = found[name]
            result["loss"] = loss if i == 0 else result["loss"]
            if i >= warmup:
                result["seconds"].append(elapsed)
                result["cpu_seconds"].append(busy)
                if device.type == "cuda":
                    result["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
                    result["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def plain_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The peer's tensors by our names."""
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for part in ("base_model.model.", ".base_layer", ".default", ".modules_to_save", ".original_module"):
            name = name.replace(part, "")
        found[name] = parameter.detach()
    return found


def told(results: dict[str, dict], tokens: int) -> list[tuple[str, ...]]:
    """Print what `measure` found, and return the rows of COLUMNS. tokens: of a step."""
    rows = []
    for name, result in results.items():
        times, gib = result["seconds"], [result["allocated_gib"], result["peak_gib"]]
        median = result["median"] = statistics.median(times)
        shown = ["" if each is None else f"{each:.1f}" for each in gib]
        busy = result["cpu_median"] = statistics.median(result["cpu_seconds"])
        used = f", peak {shown[0]} GiB allocated, {shown[1]} reserved" if all(shown) else f", CPU time {busy:.3f} s"
        print(
            f"{CONTENDERS[name]:26s} {median:.4f} s ({min(times):.3f} .. {max(times):.3f}), "
            f"{tokens / median:,.0f} tokens/s, first loss {result['loss']:.4f}{used}"
        )
        rows.append((CONTENDERS[name], f"{median:.4f}", f"{tokens / median:,.0f}", *shown))
    for name in results if "ours" in results else ():
        if name != "ours":
            ratio = results[name]["median"] / results["ours"]["median"]
            print(f"ours is {ratio:.3f} times as fast as {CONTENDERS[name]} (takes {1 / ratio:.3f} of its time)")
            if results[name]["peak_gib"] is None:  # on a CPU; what to compare where others use it too
                print(f"ours takes {results['ours']['cpu_median'] / results[name]['cpu_median']:.3f} of its CPU time")
    return rows


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    add_machine(parser)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_length", type=int, default=256)
    parser.add_argument("--labels", choices=("half", "all"), default="half")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--target_modules", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--use_dora", action="store_true", help="DoRA: magnitudes beside A and B")
    parser.add_argument("--expert_lora", choices=("shared_a", "shared"), help="for ours alone")
    parser.add_argument("--recompute", choices=("none", "full"), default="none")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), help="default: all that can run here")
    parser.add_argument("--at_once", action="store_true", help="on a GPU: all contenders there, their steps in turn")
    parser.add_argument("--no_cuda_graphs", dest="cuda_graphs", action="store_const", const=False)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    options = parser.parse_args()
    device, dtype = machine(options)
    fields = read_fields(options.model)
    targets = options.target_modules
    lora = {
        "r": options.r,
        "lora_alpha": 2 * options.r,
        "lora_dropout": options.dropout,
        "use_dora": options.use_dora,
        "target_modules": targets[0] if targets == ["all-linear"] else targets,
    }
    if options.expert_lora:
        lora["expert_lora"] = options.expert_lora
    data = Step(options.rows, options.seq_length, fields["vocab_size"], options.labels == "half", device)
    read = data.read
    names = options.contenders or ["ours", "peft", *(["liger"] if device.type == "cuda" and has_liger() else [])]
    make = {
        "ours": lambda: ours(None, fields, lora, data, dtype, options),
        "fp8": lambda: ours(None, fields, lora, data, dtype, options, "fp8"),
        "nf4": lambda: ours(None, fields, lora, data, dtype, options, "nf4"),
        "nf4_fp8": lambda: ours(None, fields, lora, data, dtype, options, "nf4_fp8"),
        "plain": lambda: ours(None, fields, lora | {"use_dora": False}, data, dtype, options),
        "peft": lambda: peers(build_peer(fields, lora, dtype, device, options), read),
        "liger": lambda: peers(with_liger(build_peer(fields, lora, dtype, device, options)), read, cudnn_attention),
    }
    if device.type == "cpu" and names == ["ours", "peft"]:
        model = build_peer(fields, lora, dtype, device, options)
        steps = {"ours": ours(plain_weights(model), fields, lora, data, dtype, options), "peft": peers(model, read)}
        results = measure(steps, device, options.warmup, options.steps)
    elif options.at_once:
        results = measure({name: make[name]() for name in names}, device, options.warmup, options.steps)
    else:
        results = {}
        for name in names:
            try:
                results |= measure({name: make[name]()}, device, options.warmup, options.steps)
            except torch.OutOfMemoryError:
                print(f"{CONTENDERS[name]:26s} out of memory")
            release(device)
    rows = told(results, data.token_count)
    where = where_of(device)
    print(f"{where}, {dtype}, torch {torch.__version__}")
    if options.output:
        about = f"{options.rows} rows of {options.seq_length} tokens, r {options.r}, p {options.dropout}, {dtype}."
        figures = {"options": vars(options), "results": results}
        record(options.output, "A training step", about, where, COLUMNS, rows, figures)


if __name__ == "__main__":
    main()
