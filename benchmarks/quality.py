"""What a base in 8 or 4 bits costs in quality: loss curves beside those of two seeds, and adapter gradients.

    python benchmarks/quality.py --model models/SmolLM2-135M-Instruct --data_path rows.json

Curves: `megalora finetune` on the dense base with seeds 1 and 2, and on each --base_format with seed 1, all at the same
time on one device. Printed are the mean differences of their losses, step by step and smoothed over --window steps: a
seed decides the order of the rows, the first adapters and the dropout, and all three are the same for the formats of
one seed. With --eval_data_path the losses of those rows at the end stand beside them.

Gradients: those of the first step's rows by every adapter, B of std 0.01, without dropout, against float64 on the base
as the files have it: the least cosine of all A and B, and that of all of them in one vector; then the least quotient of
a cosine and that of the same adapter on the dense base. The bar is 0.995 of the dense base's for every linear.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import add_machine, machine, record, where_of
from train_step import LEARNING_RATE

from megalora.adapters.config import LoraConfig
from megalora.building import EngineSettings, build_trainer, load_base_weights, resolve_lora, settle_head
from megalora.choices import BASE_FORMATS
from megalora.data import Loader, load_dataset
from megalora.flags import DataArguments
from megalora.models.config import read_config
from megalora.models.stage import Stage
from megalora.parallel.formats import BaseFormat
from megalora.parallel.mesh import Axis, ParallelMesh
from megalora.parallel.placement import Placement
from megalora.planning.nodes import Workload
from megalora.rows import data_settings, rendering

ROOT = Path(__file__).resolve().parents[1]
BAR = 0.995
B_STD = 0.01
Gradients = dict[str, torch.Tensor]


# ---- loss curves


def command(options, lora: Path, output: Path, base_format: str, seed: int) -> list[str]:
    flags = {
        "model_path": options.model, "data_path": options.data_path, "lora_config": lora, "output_dir": output,
        "eval_data_path": options.eval_data_path, "seq_length": options.seq_length, "max_steps": options.steps,
        "per_device_train_batch_size": options.rows, "learning_rate": options.learning_rate, "seed": seed,
        "base_format": base_format, "dtype": options.dtype, "save": "false", "report_to": "none",
        "data_cache": output.parent / "tokens", "overwrite_output_dir": "true",
    }  # fmt: skip
    words = [(f"--{name}", str(value)) for name, value in flags.items() if value is not None]
    return [sys.executable, "-m", "megalora", "finetune", *(word for pair in words for word in pair)]


def column(file: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in file.read_text(encoding="utf-8").splitlines()]


def curves(options, lora: dict, folder: Path) -> dict[str, dict]:
    """{name: {"losses": one a step, "evaluation": the last one's loss or None}} of all runs, made at the same time."""
    file = folder / "lora_config.json"
    file.write_text(json.dumps(lora), encoding="utf-8")
    asked = {f"dense, seed {seed}": ("dense", seed) for seed in options.seeds}
    asked |= {f"{name}, seed {options.seeds[0]}": (name, options.seeds[0]) for name in options.base_format}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if torch.device(options.device).type == "cpu" else {}
    running, begun = {}, time.perf_counter()
    for name, (base_format, seed) in asked.items():
        output = folder / f"{base_format}-{seed}"
        with open(folder / f"{base_format}-{seed}.log", "w", encoding="utf-8") as log:
            words = command(options, file, output, base_format, seed)
            running[name] = output, subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    codes = {name: process.wait() for name, (_, process) in running.items()}
    print(f"{len(asked)} runs of {options.steps} steps at a time: {time.perf_counter() - begun:.0f} s")
    for name, code in codes.items():
        if code:
            told = running[name][0].with_suffix(".log").read_text(encoding="utf-8")
            raise SystemExit(f"error: the run on {name} ended with status {code}:\n{told[-3000:]}")
    found = {}
    for name, (output, _) in running.items():
        evaluations = output / "eval_metrics.jsonl"
        last = column(evaluations, "loss")[-1] if options.eval_data_path else None
        found[name] = {"losses": column(output / "metrics.jsonl", "loss"), "evaluation": last}
        assert len(found[name]["losses"]) == options.steps, (name, len(found[name]["losses"]))
    return found


def apart(a: dict, b: dict, window: int) -> dict[str, float]:
    """Mean differences of two runs' losses."""
    x, y = (torch.tensor(each["losses"], dtype=torch.float64) for each in (a, b))
    smooth = [each.unfold(0, window, 1).mean(1) for each in (x, y)]
    found = {"steps": (x - y).abs().mean().item(), "smoothed": (smooth[0] - smooth[1]).abs().mean().item()}
    found["last"] = (smooth[0][-1] - smooth[1][-1]).abs().item()
    if a["evaluation"] is not None:
        found["evaluation"] = abs(a["evaluation"] - b["evaluation"])
    return found


def differences(runs: dict[str, dict], options) -> dict[str, dict[str, float]]:
    """{what: `apart`} of the two seeds, and of each format and the dense base with the first seed."""
    first, second = (runs[f"dense, seed {seed}"] for seed in options.seeds)
    found = {"two seeds of the dense base": apart(first, second, options.window)}
    for name in options.base_format:
        run = runs[f"{name}, seed {options.seeds[0]}"]
        found[f"{name} and dense, one seed"] = apart(first, run, options.window)
    return found


# ---- gradients


def draw(stage: Stage) -> None:
    """The same adapters in every dtype: A as it starts in a run, B of std B_STD."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(stage.trainable().items()):
        std = parameter.shape[1] ** -0.5 / 3**0.5 if name.endswith("lora_A.weight") else B_STD
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def gradients(options, lora: dict, base_format: str, dtype: torch.dtype, device: torch.device) -> Gradients:
    """Of the first step's rows by every adapter, float64 on the CPU."""
    config, _ = settle_head(read_config(options.model), options.model)
    data = DataArguments(data_path=options.data_path, seq_length=options.seq_length)
    template = rendering("CAUSAL_LM", config, options.model, data, (), Axis())
    rows = load_dataset(options.data_path, template, replace(data_settings(data), data_cache=None), options.seeds[0])
    count = min(options.rows, rows.rows)
    loader = Loader(rows, micro_batch_rows=count, num_microbatches=1, dp_rank=0, dp_size=1, seed=options.seeds[0])
    mesh = ParallelMesh()
    place = Placement(mesh.tp, False, dtype, device, base=BaseFormat(base_format))
    work = Workload(count, options.seq_length, element=dtype.itemsize, base_format=base_format)

    def fill(stage: Stage) -> None:
        load_base_weights(stage, options.model)
        draw(stage)

    settings = EngineSettings(work, lambda step: 0.0, max_grad_norm=0.0)
    resolved = resolve_lora(LoraConfig.from_dict(lora | {"lora_dropout": 0.0}), config)
    engine = build_trainer(config, mesh, resolved, place, settings, fill)
    result = engine.trainer.step(0, loader.step(0))
    print(f"{base_format}, {dtype}: loss {result.loss:.6f} of the first step's rows")
    found = {name: parameter.grad.double().cpu() for name, parameter in engine.parameters.items()}
    engine.trainer.close()
    return found


def cosines(ours: Gradients, exact: Gradients) -> dict[str, float]:
    """Cosine of each adapter's gradient and the exact one; "": of all as one vector."""
    assert ours.keys() == exact.keys()

    def flat(of: Gradients) -> torch.Tensor:
        return torch.cat([of[name].flatten() for name in sorted(of)])

    pairs = {name: (ours[name].flatten(), exact[name].flatten()) for name in exact} | {"": (flat(ours), flat(exact))}
    return {name: torch.nn.functional.cosine_similarity(a, b, dim=0).item() for name, (a, b) in pairs.items()}


def gradient_figures(options, lora: dict, dtype: torch.dtype, device: torch.device) -> dict[str, dict]:
    """{format: the least cosine and whose, that of all, the least quotient with the dense base's and whose}"""
    exact = gradients(options, lora, "dense", torch.float64, torch.device(options.reference_device))
    found, dense = {}, {}
    for name in ("dense", *options.base_format):
        each = cosines(gradients(options, lora, name, dtype, device), exact)
        whole = each.pop("")
        dense = dense or each
        worst, quotient = min(each, key=each.__getitem__), min(each, key=lambda key: each[key] / dense[key])
        found[name] = {
            "least": each[worst], "of": worst, "all": whole, "quotient": each[quotient] / dense[quotient],
            "quotient of": quotient, "cosines": each,
        }  # fmt: skip
    return found


# ---- the command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HF folder with weights and tokenizer")
    parser.add_argument("--data_path", required=True, help="as of megalora finetune")
    parser.add_argument("--eval_data_path", help="rows whose loss is taken at the end")
    add_machine(parser)
    parser.add_argument("--base_format", nargs="*", choices=BASE_FORMATS[1:], default=["fp8", "nf4"])
    parser.add_argument("--seeds", type=int, nargs=2, default=[1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--window", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--seq_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05, help="of the curves")
    parser.add_argument("--reference_device", default="cpu", help="of float64")
    parser.add_argument("--only", choices=("curves", "gradients"))
    parser.add_argument("--folder", type=Path, help="keep the runs there (default: a temporary folder)")
    options = parser.parse_args()
    if options.steps < options.window:
        parser.error(f"--window {options.window} is more than --steps {options.steps}: choose a smaller one")
    return options


def told_curves(apart_by: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    seeds, rows = apart_by["two seeds of the dense base"], []
    for what, by in apart_by.items():
        less = "" if by is seeds else f": {by['smoothed'] / seeds['smoothed']:.3f} of two seeds', smoothed"
        figures = [f"{by[key]:.5f}" if key in by else "" for key in ("steps", "smoothed", "last", "evaluation")]
        evaluation = f", evaluation {figures[3]}" if figures[3] else ""
        print(f"losses of {what}: {figures[0]} a step, {figures[1]} smoothed, {figures[2]} last{evaluation}{less}")
        rows.append((f"losses of {what}", *figures, "", "", ""))
    return rows


def told_gradients(found: dict[str, dict]) -> list[tuple[str, ...]]:
    rows = []
    for name, each in found.items():
        print(
            f"gradients on {name}: cosine {each['all']:.6f} of all, least {each['least']:.6f} ({each['of']}), least "
            f"share of the dense base's {each['quotient']:.6f} ({each['quotient of']}): "
            f"{'meets' if each['quotient'] >= BAR else 'misses'} {BAR}"
        )
        figures = f"{each['all']:.6f}", f"{each['least']:.6f}", f"{each['quotient']:.6f}"
        rows.append((f"gradients on {name}", "", "", "", "", *figures))
    return rows


def main() -> None:
    options = parse()
    device, dtype = machine(options)
    options.dtype = str(dtype).removeprefix("torch.")
    lora = {
        "task_type": "CAUSAL_LM", "r": options.r, "lora_alpha": 2 * options.r, "lora_dropout": options.dropout,
        "target_modules": "all-linear",
    }  # fmt: skip
    figures: dict = {"options": vars(options)}
    rows = []
    if options.only != "gradients":
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            figures["runs"] = curves(options, lora, folder)
        figures["apart"] = differences(figures["runs"], options)
        rows += told_curves(figures["apart"])
    if options.only != "curves":
        figures["gradients"] = gradient_figures(options, lora, dtype, device)
        rows += told_gradients(figures["gradients"])
    where = where_of(device)
    print(f"{where}, {dtype}, torch {torch.__version__}")
    if options.output:
        about = (
            f"{options.steps} steps of {options.rows} rows of {options.seq_length} tokens, {Path(options.model).name}, "
        )
        about += f"r {options.r} on all linears, {dtype}; losses smoothed over {options.window} steps."
        columns = ("what", "a step", "smoothed", "last", "evaluation", "cosine of all", "least", "of dense's, least")
        record(options.output, "Quality of quantised bases", about, where, columns, rows, figures)


if __name__ == "__main__":
    main()
