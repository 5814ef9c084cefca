"""The base weights of a stage, from an HF folder or shards: the whole model is checked, slices are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from megalora.checkpoint.base.hf import HfWeights, is_hf
from megalora.checkpoint.base.shards import BaseShards
from megalora.checkpoint.layout import has_shards
from megalora.errors import UserError
from megalora.parallel.split import Split

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SAMPLE = 32


class BaseWeights(Protocol):
    """A place that base weights are read from."""

    shapes: Mapping[str, tuple[int, ...]]  # of each whole tensor

    def where(self, name: str) -> str: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None: ...


def open_base(folder: str | Path, expected: Mapping[str, tuple[int, ...]], tied: bool) -> BaseWeights:
    """The base weights in `folder`, checked to be the whole model: no key missing, left over or misshapen.

    expected  every tensor of the model as HF names it, with its whole shape
    tied      the head is the embedding: `lm_head.weight` is not expected, and not read where it is there
    Raises UserError that names key, file and shape.
    """
    folder = Path(folder)
    weights: BaseWeights
    if has_shards(folder) and not is_hf(folder):
        weights = BaseShards(folder, expected)
    else:
        weights = HfWeights(folder)
    found = {n for n in weights.shapes if not n.endswith("rotary_emb.inv_freq") and not (tied and n == HEAD)}
    wanted = {n for n in expected if not (tied and n == HEAD)}
    for problem, names in (("lacks", wanted - found), ("holds the unexpected", found - wanted)):
        if names:
            first = min(names)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"base weights {folder}: {problem} {first}{more}: the weights are not those of config.json; "
                "take both from one model"
            )
    for name in sorted(wanted):
        weights.dtype(name)  # refuses one that cannot be read
        if tuple(weights.shapes[name]) != tuple(expected[name]):
            raise UserError(
                f"{weights.where(name)}: {name} has shape {list(weights.shapes[name])}, but config.json "
                f"means {list(expected[name])}: take weights and config.json from one model"
            )
    return weights


@torch.no_grad()
def load_base(
    module: nn.Module,
    folder: str | Path,
    *,
    splits: Mapping[str, Split],
    expected: Mapping[str, tuple[int, ...]],
    tied: bool,
) -> None:
    """Fills the base parameters of a stage in place: all but the adapters (`lora_`), trained biases too.

    splits  which slice of the whole tensor each parameter is (`named_splits(module)`)
    expected, tied  as in `open_base`, of the whole model; a tied head is read from the embedding
    Parameters may be uninitialised, of any float dtype, on any device. Beyond them only a block of rows is in
    memory at a time. Raises UserError as `open_base`.
    """
    weights = open_base(folder, expected, tied)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            continue
        source = EMBEDDING if tied and name == HEAD else name
        split = splits[name]
        assert source in expected and split.global_shape == tuple(expected[source]), (
            name,
            split,
            expected.get(source),
        )
        assert tuple(parameter.shape) == split.local_shape, (name, parameter.shape, split)
        weights.copy(source, split.index, parameter.data)


def model_fingerprint(folder: str | Path, expected: Mapping[str, tuple[int, ...]], tied: bool) -> str:
    """A SHA-256 over names, shapes, dtypes and a sample of the values of the base weights in `folder`.

    It is the same for an HF folder and for shards of it. Reads a few bytes of each tensor.
    Raises UserError as `open_base`.
    """
    weights = open_base(folder, expected, tied)
    digest = hashlib.sha256()
    for name in sorted(n for n in expected if not (tied and n == HEAD)):
        shape, dtype = weights.shapes[name], weights.dtype(name)
        digest.update(json.dumps([name, list(shape), str(dtype)]).encode())
        for row in sorted({0, shape[0] // 2}):
            rows = 1 if len(shape) > 1 else SAMPLE
            index = (slice(row, min(row + rows, shape[0])), *(slice(0, min(SAMPLE, n)) for n in shape[1:]))
            sample = torch.empty([s.stop - s.start for s in index], dtype=dtype)
            weights.copy(name, index, sample)
            digest.update(sample.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
