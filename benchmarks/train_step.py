"""One training step, megalora against transformers + peft, in turn on the same tokens and weights.

    OMP_NUM_THREADS=2 python benchmarks/train_step.py                    # CPU: the shape of SmolLM2-135M
    python benchmarks/train_step.py --model CONFIG.json --seq_length 2048 --labels all --r 16 --dropout 0.1 \
        --target_modules all-linear                                      # GPU, bfloat16

The model is the shape of a config.json with random weights (an HF folder with weights gives its own). Each row is one
document. A step is zero_grad, forward, backward, gradient clipping and AdamW. Prints the median of each contender, the
ratio, peak memory on a GPU, and writes JSON with --output.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megalora.batch import Batch
from megalora.building import build_stage, load_adapter, resolve_lora
from megalora.lora import LoraConfig
from megalora.models.config import config_from_dict
from megalora.optimizer import AdapterOptimizer, LossScale
from megalora.parallel.grads import FlatGradients
from megalora.parallel.linear import Placement
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.split import named_splits
from megalora.pipeline.p2p import Neighbours
from megalora.pipeline.runner import PipelineRunner
from megalora.pipeline.schedule import SCHEDULES
from megalora.training import Trainer

SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
LEARNING_RATE = 1e-4
OURS, PEER = "megalora", "transformers + peft"


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


def ours(weights: dict[str, torch.Tensor], fields: dict, lora: dict, data: Step, dtype: torch.dtype, options):
    """A function that makes one step of ours and returns its loss."""
    config = config_from_dict(fields)
    mesh = ParallelMesh()
    resolved = resolve_lora(LoraConfig.from_dict(lora), config)
    device = data.ids.device
    place = Placement(mesh.tp, False, dtype, device)
    stage, cut = build_stage(config, mesh, resolved, place, recompute=options.recompute)
    parameters = stage.trainable()
    for name, parameter in stage.named_parameters():
        if not parameter.requires_grad:
            parameter.data.copy_(weights[name])
    load_adapter(stage, {name: weights[name] for name in parameters}, "of the benchmark")
    shape = (data.token_count, config.hidden_size)
    trainer = Trainer(
        stage,
        mesh,
        PipelineRunner(stage, Neighbours(mesh, shape, dtype, device), SCHEDULES["1f1b"], cut.floor, device=device),
        FlatGradients(parameters, named_splits(stage), mesh),
        AdapterOptimizer(parameters),
        learning_rate=lambda step: LEARNING_RATE,
        max_grad_norm=1.0,
        seed=0,
        loss_scale=LossScale(False),
        clock=lambda phase: contextlib.nullcontext(),
    )
    count = iter(range(10**9))
    return lambda: trainer.step(next(count), data).loss


def peers(model: torch.nn.Module, data: Step) -> Callable[[], float]:
    """A function that makes one step of transformers + peft and returns its loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=data.ids, labels=data.labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def build_peer(fields: dict, lora: dict, dtype: torch.dtype, device: torch.device, options) -> torch.nn.Module:
    """The peft model, with a B that is not zero; random weights unless --model names a folder with some."""
    import peft
    import transformers

    torch.manual_seed(0)
    if options.model and any(Path(options.model).glob("*.safetensors")):
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device)
    else:
        config = transformers.CONFIG_MAPPING[fields["model_type"]](**fields)
        with device:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    model.train()
    if options.recompute == "full":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def plain_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The peer's tensors by our names."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", ""): p.detach()
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="config.json or HF folder (default: the shape of SmolLM2-135M)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_length", type=int, default=256)
    parser.add_argument("--labels", choices=("half", "all"), default="half")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--target_modules", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--recompute", choices=("none", "full"), default="none")
    parser.add_argument("--only", choices=("ours", "peer"), help="leave the other out (memory, profiles)")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

    fields = SMOLLM2_135M
    if options.model:
        path = Path(options.model)
        fields = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    targets = options.target_modules
    lora = {
        "r": options.r,
        "lora_alpha": 2 * options.r,
        "lora_dropout": options.dropout,
        "target_modules": targets[0] if targets == ["all-linear"] else targets,
    }
    data = Step(options.rows, options.seq_length, fields["vocab_size"], options.labels == "half", device)
    model = build_peer(fields, lora, dtype, device, options)
    contenders = {}
    if options.only != "peer":
        contenders[OURS] = ours(plain_weights(model), fields, lora, data, dtype, options)
    if options.only != "ours":
        contenders[PEER] = peers(model, data)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    losses, peaks = {}, {}
    for i in range(options.warmup + options.steps):
        for name, step in contenders.items():
            if device.type == "cuda":
                gc.collect()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            loss = step()  # its value is read on the host, so the step has ended
            if device.type == "cuda":
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
            losses.setdefault(name, loss)
            if i >= options.warmup:
                seconds[name].append(elapsed)
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} .. {max(seconds[name]):.3f}"
        memory = f", peak {peaks[name]:.1f} GiB" if peaks[name] is not None else ""
        speed = data.token_count / median
        print(f"{name:20s} {median:.4f} s ({spread}), {speed:,.0f} tokens/s, first loss {losses[name]:.4f}{memory}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    ratio = medians[OURS] / medians[PEER] if len(medians) == 2 else None
    if ratio is not None:
        print(f"time ours / peer {ratio:.3f}")
    print(f"{where}, {dtype}, torch {torch.__version__}")
    if options.output:
        record = {"options": vars(options) | {"output": None}, "where": where, "torch": torch.__version__}
        record |= {"medians": medians, "seconds": seconds, "ratio": ratio, "peak_gib": peaks, "losses": losses}
        options.output.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
