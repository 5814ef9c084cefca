"""What the benchmarks share: the machine that they run on, the record of a result, transformers' model."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megalora.models.stage import Stage
from megalora.ops.fp8 import Fp8Weight, quantise_fp8
from megalora.ops.nf4 import Nf4Weight, quantise_nf4
from megalora.parallel.linear import ParallelLinear

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


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="config.json or HF folder (default: the shape of SmolLM2-135M)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--output", type=Path, help="JSON file for the result, as in benchmarks/results/")


def machine(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """(device, dtype) as asked for; on a CPU with OMP_NUM_THREADS threads, or 2."""
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    return device, getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def where_of(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def commit() -> str:
    """Return the commit of this tree, marked where files differ from it."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (", changed" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git repository)"


def record(
    file: Path,
    title: str,
    about: str,
    card: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    figures: object,
) -> None:
    """Write a result with its commit, card, torch and command line: what benchmarks/results.py makes a section of.

    figures  the numbers behind the rows, as JSON can hold them
    """
    told = {
        "title": title,
        "about": about,
        "commands": [shlex.join(["python", *sys.argv])],
        "card": card,
        "torch": torch.__version__,
        "commit": commit(),
        "columns": list(columns),
        "rows": [list(map(str, row)) for row in rows],
        "figures": figures,
    }
    file.write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")


def read_fields(model: str | None) -> dict:
    """Of the config.json that --model names."""
    if model is None:
        return SMOLLM2_135M
    path = Path(model)
    return json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))


@torch.no_grad()
def fill_quantised(stage: Stage, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Quantise `weights`, or random ones, into the linears whose base is in 8 or 4 bits: they have no parameter to be
    filled. One linear at a time is in 16 bits, those of experts too. Random ones are made once for all linears of a
    name and shape, and copied: a base of 70B is there in seconds.
    """
    quantise = quantise_fp8 if stage.place.base.name == "fp8" else quantise_nf4
    made: dict[tuple, torch.Tensor | Nf4Weight | Fp8Weight] = {}
    for linear in stage.modules():
        if not (isinstance(linear, ParallelLinear) and linear.weight is None):
            continue
        if weights is not None:
            linear.fill_weight(_Weight(weights[f"{linear.name}.weight"]))
            continue
        shape = linear.shard_dims()["weight"].global_shape
        kind = linear.name.rsplit(".", 1)[-1], shape
        if kind not in made:
            whole = torch.randn(shape, dtype=torch.bfloat16, device=stage.place.device).mul_(0.02)
            made[kind] = whole if linear.transposed else quantise(whole)  # no file has it quantised the other way round
        linear.fill_weight(_Weight(made[kind]))


class _Weight:
    """As a file would hold it (a megalora.parallel.base.WeightSource): in floating point, or quantised."""

    def __init__(self, whole: torch.Tensor | Nf4Weight | Fp8Weight):
        self._whole, self.dtype = whole, torch.bfloat16 if not isinstance(whole, torch.Tensor) else whole.dtype

    def copy(self, index: tuple[slice, ...], out: torch.Tensor) -> None:
        out.copy_(self._whole[index])

    def stored(self) -> Nf4Weight | Fp8Weight | None:
        """Return a copy of what is quantised, which the linear keeps."""
        whole = self._whole
        return None if isinstance(whole, torch.Tensor) else replace(whole, codes=whole.codes.clone())


def build_base(fields: dict, dtype: torch.dtype, device: torch.device, folder: str | None) -> torch.nn.Module:
    """transformers' model without an adapter: the weights of `folder` where it has some, else random ones."""
    import transformers

    torch.manual_seed(0)
    if folder and any(Path(folder).glob("*.safetensors")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        return model.to(device)
    config = transformers.CONFIG_MAPPING[fields["model_type"]](**fields)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
