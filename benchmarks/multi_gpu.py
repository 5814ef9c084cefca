"""What tensor, pipeline and data parallelism cost on the GPUs of one host: runs of tools/finetune.py through NCCL.

    python benchmarks/multi_gpu.py --model CONFIG.json --folder /scratch/multi_gpu

Writes a model of the shape of a config.json with random weights and rows of random words into --folder (kept for the
next call), trains it on every layout that the GPUs here allow, one after another, and prints tokens/s for each GPU,
beside one GPU with the same rows in a microbatch and, for pipelines, beside the schedule's own bubble. Without GPUs it
runs on CPU processes (--processes), which proves the script and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megalora.models.config import config_from_dict
from megalora.models.stage import expected_weights
from megalora.pipeline.actions import COMPUTE
from megalora.pipeline.schedule import SCHEDULES
from megalora.pipeline.simulate import simulate

ROOT = Path(__file__).resolve().parents[1]
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
WORDS = [f"w{i}" for i in range(4096)]
CHAT = "{% for message in messages %}{{ '<s> ' + message['content'] + ' </s> ' }}{% endfor %}"


@dataclass(frozen=True)
class Layout:
    """One run. microbatches: of a step of one data-parallel rank."""

    name: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    microbatches: int = 1
    flags: dict[str, object] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.dp

    def efficiency(self) -> float | None:
        """The part of the time that the pipeline's stages compute: forward and backward of a LoRA step take alike."""
        if self.pp == 1:
            return None
        schedule = SCHEDULES[str(self.flags.get("schedule", "1f1b"))]
        programme = schedule.programme(self.pp, self.microbatches, 0, int(self.flags.get("virtual_pipeline_size", 1)))
        timeline = simulate(programme, lambda stage, action: float(action.op in COMPUTE))
        return 1.0 - timeline.bubble


def layouts(processes: int) -> list[Layout]:
    """Every layout of the table that `processes` GPUs allow; those of one GPU come first, to be compared with."""
    sequence = {"sequence_parallel": True}
    interleaved = {"schedule": "interleaved_1f1b", "virtual_pipeline_size": 2}
    wanted = [
        Layout("one", microbatches=2),
        Layout("one, 16 microbatches", microbatches=16),
        Layout("tp2, sequence parallel", tp=2, microbatches=2, flags=sequence),
        Layout("tp4, sequence parallel", tp=4, microbatches=2, flags=sequence),
        Layout("dp2", dp=2, microbatches=2),
        Layout("dp4", dp=4, microbatches=2),
        Layout("pp2, 1f1b", pp=2, microbatches=16),
        Layout("pp2, interleaved", pp=2, microbatches=16, flags=interleaved),
        Layout("pp4, 1f1b", pp=4, microbatches=16),
        Layout("pp4, interleaved", pp=4, microbatches=16, flags=interleaved),
        Layout("tp2 pp2", tp=2, pp=2, microbatches=16, flags=sequence),
        Layout("tp2 pp2 dp2", tp=2, pp=2, dp=2, microbatches=16, flags=sequence),
        Layout("tp4 pp2", tp=4, pp=2, microbatches=16, flags=sequence),
        Layout("tp8", tp=8, microbatches=2, flags=sequence),
    ]
    return [layout for layout in wanted if layout.processes <= processes]


def write_model(fields: dict, folder: Path) -> None:
    """An HF folder of random bfloat16 weights, a file a layer, with a tokenizer of words."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in expected_weights(config_from_dict(fields)).items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    index = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for file, shapes in files.items():
        tensors = {
            name: (torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, device=device)).bfloat16().cpu()
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))


def write_rows(file: Path, count: int, length: int) -> None:
    """`count` documents that nearly fill a row of `length` tokens, nearly all of them the reply's."""
    draw = random.Random(0)
    rows = [
        {"instruction": "w0", "input": "", "output": " ".join(draw.choices(WORDS, k=length - 16))} for _ in range(count)
    ]
    file.write_text(json.dumps(rows))


def run(layout: Layout, options: argparse.Namespace) -> dict[str, float]:
    """Trains on the layout; tokens/s over the logged steps after the first two, and the last loss."""
    output = options.folder / "runs" / layout.name.replace(" ", "_").replace(",", "")
    flags = {
        "model_path": options.folder / "model",
        "data_path": options.folder / "rows.json",
        "lora_config": options.folder / "lora_config.json",
        "output_dir": output,
        "overwrite_output_dir": True,
        "save": False,
        "seq_length": options.seq_length,
        "per_device_train_batch_size": options.rows,
        "gradient_accumulation_steps": layout.microbatches,
        "tensor_parallel_size": layout.tp,
        "pipeline_parallel_size": layout.pp,
        "num_train_epochs": 1000,
        "max_steps": options.steps,
        **layout.flags,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value).lower()
             if isinstance(value, bool) else str(value))]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", str(layout.processes), str(ROOT / "tools/finetune.py"), *words]
    # NVLink multicast is left off: not every host lets a container use it, and NCCL would hang in its set-up.
    environment = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"} | dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{layout.name}: exit status {done.returncode}\n{done.stderr[-4000:]}")
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(step["tokens_per_second"] for step in steps[2:])
    return {"tokens_per_second": speed, "loss": steps[-1]["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="config.json")
    parser.add_argument("--folder", required=True, type=Path, help="scratch space: twice the weights must fit")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2, help="default: the GPUs here")
    parser.add_argument("--only", nargs="*", help="names of layouts; those of one process are always run")
    parser.add_argument("--rows", type=int, default=1, help="of a microbatch")
    parser.add_argument("--seq_length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    fields = json.loads(options.model.read_text(encoding="utf-8"))
    folder = options.folder
    if not (folder / "model" / "config.json").exists():
        write_model(fields, folder / "model")
    write_rows(folder / "rows.json", 16 * options.rows * options.processes, options.seq_length)
    (folder / "lora_config.json").write_text(json.dumps(LORA))

    chosen = [
        layout
        for layout in layouts(options.processes)
        if options.only is None or layout.name in options.only or layout.processes == 1
    ]
    alone: dict[int, float] = {}  # tokens/s of one GPU, by microbatches
    records = []
    print("| layout | tokens/s of a GPU | of one GPU | predicted | last loss |\n|---|---|---|---|---|")
    for layout in chosen:
        figures = run(layout, options)
        each = figures["tokens_per_second"] / layout.processes
        if layout.processes == 1:
            alone[layout.microbatches] = each
        ratio, expected = each / alone[layout.microbatches], layout.efficiency()
        predicted = "" if expected is None else f"{expected:.3f}"
        print(f"| {layout.name} | {each:,.0f} | {ratio:.3f} | {predicted} | {figures['loss']:.6f} |", flush=True)
        records.append({"layout": layout.name, "each": each, "ratio": ratio, "predicted": expected, **figures})
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{options.processes} x {where}, torch {torch.__version__}")
    if options.output:
        options.output.write_text(json.dumps({"where": where, "records": records}, indent=1))


if __name__ == "__main__":
    main()
