"""One training step of unsloth, on the tokens and by the clock of train_step.py.

    python benchmarks/unsloth_step.py --model CONFIG.json --rows 4 --seq_length 2048                  # LoRA, bfloat16
    python benchmarks/unsloth_step.py --model CONFIG.json --base nf4 --recompute unsloth              # QLoRA

Needs a GPU, unsloth, unsloth_zoo and bitsandbytes, and no network. unsloth loads from a folder alone: one is written
with random weights in the shape of a config.json (an HF folder with weights is loaded as it is) and is removed once
the model is on the GPU. r 16 on all linears without dropout, where unsloth is fastest; a step is zero_grad, forward
under autocast as unsloth's trainer runs it, backward, gradient clipping and AdamW. Prints the median, tokens/s and
peak memory of a step (allocated and reserved); --output writes JSON.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import faulthandler
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

SCRATCH = Path(tempfile.mkdtemp(prefix="unsloth_step_"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",  # it is read by presence
    "UNSLOTH_COMPILE_LOCATION": str(SCRATCH / "compiled"),  # sources that it writes while it is imported
    "UNSLOTH_SDPA_CUDNN_BUCKET": "0",  # with cuDNN's attention it pads rows, for the sake of changing lengths
    "CUDA_VISIBLE_DEVICES": "0",  # of several it takes other paths
}.items():
    os.environ.setdefault(name, value)

try:
    with contextlib.redirect_stdout(sys.stderr):
        import unsloth  # first: it patches torch, transformers and peft while they are imported
except ModuleNotFoundError as error:
    if error.name != "unsloth":
        raise
    raise SystemExit("error: unsloth is not installed\nhint: pip install unsloth") from error

import torch  # noqa: E402
from common import add_machine, add_model, machine, read_fields, record, where_of  # noqa: E402
from random_folder import write_folder  # noqa: E402
from train_step import COLUMNS, LEARNING_RATE, Step, cudnn_attention, draw_b, measure  # noqa: E402

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKPOINTING = {"none": False, "full": True, "unsloth": "unsloth"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    add_machine(parser)
    parser.add_argument("--base", choices=("bf16", "nf4", "nf4_at_load"), default="bf16", help="nf4: a folder in nf4")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_length", type=int, default=2048)
    parser.add_argument("--labels", choices=("half", "all"), default="all")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--target_modules", nargs="+", default=["all-linear"])
    parser.add_argument("--recompute", choices=tuple(CHECKPOINTING), default="none")
    parser.add_argument("--optimizer", choices=("adamw", "adamw_8bit"), default="adamw", help="adamw: torch's, fused")
    parser.add_argument("--attention", choices=("torch", "cudnn"), default="torch", help="torch: its own choice")
    parser.add_argument("--layers", type=int, help="so many in place of the configuration's")
    parser.add_argument("--folder", type=Path, help="where to write the model (default: /dev/shm if it has the room)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to load with it instead of a made-up one")
    parser.add_argument("--limit", type=int, default=90, help="seconds after which to give up")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=4)
    return parser.parse_args()


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after `seconds`; where Python does not answer, end the process with a traceback 20 s later."""

    def give_up(*_) -> None:
        raise TimeoutError(f"not done after {seconds} s (--limit)")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(seconds + 20, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def model_folder(fields: dict, options: argparse.Namespace, device: torch.device) -> Iterator[Path]:
    """The folder that --model names, or one with random weights, which is removed at the end."""
    if options.model and any(Path(options.model).glob("*.safetensors")):
        yield Path(options.model)
        return
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free if shared.is_dir() else 0
    parent = options.folder or (shared if room > 64 * 2**30 else SCRATCH)
    folder = Path(tempfile.mkdtemp(prefix="unsloth_step_", dir=parent))
    try:
        start = time.perf_counter()
        size = write_folder(folder, fields, "nf4" if options.base == "nf4" else "bf16", device)
        if options.tokenizer:
            shutil.copy(options.tokenizer, folder / "tokenizer.json")
        print(f"wrote {size / 1e9:.1f} GB in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(folder: Path, options: argparse.Namespace) -> torch.nn.Module:
    """unsloth's model with adapters whose B is not zero, ready to train."""
    checkpointing = CHECKPOINTING[options.recompute]
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=options.seq_length,
        dtype=torch.bfloat16,
        load_in_4bit=options.base != "bf16",
        load_in_16bit=options.base == "bf16",
        use_gradient_checkpointing=checkpointing,
        device_map={"": 0},
        offload_embedding=False,
        local_files_only=True,
        trust_remote_code=False,
        use_exact_model_name=True,
    )
    targets = options.target_modules
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=options.r,
        target_modules=LINEARS if targets == ["all-linear"] else targets,
        lora_alpha=2 * options.r,
        lora_dropout=options.dropout,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        max_seq_length=options.seq_length,
    )
    unsloth.FastLanguageModel.for_training(model)  # as its trainer does: turns checkpointing on where asked for
    draw_b(model)
    return model


def make_step(model: torch.nn.Module, data: Step, options: argparse.Namespace) -> Callable[[], float]:
    """A function that makes one step and returns its loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if options.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    else:
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    attention = cudnn_attention if options.attention == "cudnn" else contextlib.nullcontext

    def step() -> float:
        optimizer.zero_grad()
        with attention():
            with torch.autocast(data.ids.device.type, torch.bfloat16):
                loss = model(**data.read).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def report(result: dict, data: Step, options: argparse.Namespace, device: torch.device) -> None:
    """Print the figures, and write them where --output asks for it."""
    times, speed = result["seconds"], data.token_count / result["median"]
    gib = [f"{result[kind]:.1f}" for kind in ("allocated_gib", "peak_gib")]
    what = f"unsloth {unsloth.__version__}, {options.base}, recompute {options.recompute}"
    print(
        f"{what}: {result['median']:.4f} s ({min(times):.3f} .. {max(times):.3f}), {speed:,.0f} tokens/s, "
        f"first loss {result['loss']:.4f}, peak {gib[0]} GiB allocated, {gib[1]} reserved"
    )
    print(f"{where_of(device)}, torch {torch.__version__}, {options.optimizer}, attention of {options.attention}")
    if options.output:
        row = (what, f"{result['median']:.4f}", f"{speed:,.0f}", *gib)
        about = f"{options.rows} rows of {options.seq_length} tokens, r {options.r}, p {options.dropout}."
        figures = {"options": vars(options), "results": {"unsloth": result}}
        record(options.output, "A training step of unsloth", about, where_of(device), COLUMNS, [row], figures)


def run(options: argparse.Namespace) -> None:
    device, _ = machine(options)
    if device.type != "cuda":
        raise SystemExit("error: unsloth's kernels need a GPU\nhint: run this where torch.cuda.is_available()")
    fields = read_fields(options.model)
    if options.layers:
        fields = fields | {"num_hidden_layers": options.layers}
    with model_folder(fields, options, device) as folder, contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        model = load(folder, options)
        print(f"loaded in {time.perf_counter() - start:.1f} s")
    torch.cuda.empty_cache()
    data = Step(options.rows, options.seq_length, fields["vocab_size"], options.labels == "half", device)
    step = make_step(model, data, options)
    result = measure({"unsloth": step}, device, options.warmup, options.steps)["unsloth"]
    report(result | {"median": statistics.median(result["seconds"])}, data, options, device)


def main() -> None:
    options = parse()
    try:
        with time_limit(options.limit):
            run(options)
    except torch.OutOfMemoryError:
        print(f"unsloth, {options.base}, recompute {options.recompute}: out of memory")
    except Exception:
        print("".join(traceback.format_exc().splitlines(keepends=True)[-15:]), file=sys.stderr)
        raise SystemExit(f"error: unsloth, {options.base}, recompute {options.recompute}: no result") from None


if __name__ == "__main__":
    main()
