"""The base weights of a stage, from an HF folder or shards: the whole model is checked, slices are read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from megalora.checkpoint.base.hf import HfWeights, is_hf
from megalora.checkpoint.base.quantised import QuantisedWeights, is_quantised
from megalora.checkpoint.base.resized import ResizedWeights
from megalora.checkpoint.base.shards import BaseShards
from megalora.checkpoint.base.source import BaseWeights
from megalora.checkpoint.base.stacked import Joined, Unstacked
from megalora.checkpoint.layout import has_shards
from megalora.errors import UserError
from megalora.ops.fp8 import Fp8Weight
from megalora.ops.nf4 import Nf4Weight
from megalora.parallel.linear import ParallelLinear
from megalora.parallel.split import Split

SAMPLE = 32
HEAD_ROWS = 4096  # that are compared at a time


class FileNames(Protocol):
    """How the names of a file may differ from ours."""

    def ours(self, name: str, expected: Collection[str]) -> str | None:
        """Return our name of a tensor of the file, None for one that says nothing."""
        ...

    @property
    def carried(self) -> tuple[str, ...]:
        """Starts of names of what is not read, and goes into files that are made of these."""
        ...

    @property
    def ahead(self) -> tuple[str, ...]:
        """Those of `carried` that are layers which predict further tokens."""
        ...


@dataclass(frozen=True)
class BaseNames:
    """What the files of a model's base weights must hold.

    shapes           every tensor of the model, whole, by our name; without the head where it is tied
    embedding, head  names of the two matrices that may be one
    tied             the head is the embedding: it is not read where the file has it
    files            how names in files differ from ours
    optional         tensors that are trained in full: files need not have them, and they are no part of the base
    words            rows that the matrices of the words get, where the model has another number than its files
    stacks           tensors of files that hold several of `shapes`: their names -> ours, in order
    joins            those of `shapes` that some files have in parts: our names -> theirs, in order
    """

    shapes: Mapping[str, tuple[int, ...]]
    embedding: str
    head: str
    tied: bool
    files: FileNames
    optional: frozenset[str] = frozenset()
    words: int | None = None
    stacks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    joins: Mapping[str, Sequence[str]] = field(default_factory=dict)


class _Weight:
    """One of them (a megalora.parallel.base.WeightSource)."""

    def __init__(self, weights: BaseWeights, name: str):
        self._weights, self._name = weights, name

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.dtype(self._name)

    def copy(self, index: tuple[slice, ...], out: torch.Tensor) -> None:
        self._weights.copy(self._name, index, out)

    def stored(self) -> Nf4Weight | Fp8Weight | None:
        return self._weights.stored(self._name)


class _Watched:
    """Base weights that count, as they are copied, the values that are not finite where they are put."""

    def __init__(self, weights: BaseWeights):
        self._weights, self.shapes = weights, weights.shapes
        self._counts: dict[str, torch.Tensor] = {}  # on the device, which is not waited for

    def where(self, name: str) -> str:
        return self._weights.where(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(name)

    def stored(self, name: str) -> Nf4Weight | Fp8Weight | None:
        return self._weights.stored(name)

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        self._weights.copy(name, index, out)
        if out.device.type == "cpu" and (not out.numel() or all(map(math.isfinite, map(float, out.aminmax())))):
            return  # 10 GB/s, where counting has 0.15
        count = (~out.isfinite()).sum()
        self._counts[name] = self._counts[name] + count if name in self._counts else count

    def told(self) -> tuple[str, ...]:
        """Return a line for each tensor that holds such values."""
        counts = {name: int(count) for name, count in self._counts.items()}
        return tuple(
            f"{self.where(name)}: {name}: {count:,} values are not finite: what reads them gives NaN"
            for name, count in counts.items()
            if count
        )


class _Renamed:
    """Base weights by our names. files: our name of a tensor -> its name in the file."""

    def __init__(self, weights: BaseWeights, files: Mapping[str, str]):
        self._weights, self._files = weights, files
        self.shapes = {ours: weights.shapes[name] for ours, name in files.items()}

    def where(self, name: str) -> str:
        return self._weights.where(self._files[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(self._files[name])

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        self._weights.copy(self._files[name], index, out)

    def stored(self, name: str) -> Nf4Weight | Fp8Weight | None:
        return self._weights.stored(self._files[name])


def open_base(folder: str | Path, names: BaseNames) -> BaseWeights:
    """Return the base weights in `folder`, checked to be the whole model: no key missing, left over or misshapen.

    Raises UserError that names key, file and shape.
    """
    folder = Path(folder)
    weights = _as_they_lie(folder, names)
    files: dict[str, str] = {}
    renamed = False
    for name in weights.shapes:
        ours = names.files.ours(name, names.shapes)
        if ours is None or (names.tied and ours == names.head):
            continue
        if ours in files:
            raise UserError(
                f"{weights.where(name)}: holds {name} and {files[ours]}, two names of one tensor", "keep one of them"
            )
        files[ours], renamed = name, renamed or ours != name
    _check_prefix(folder, weights, files, names)
    for problem, found in (
        ("lacks", names.shapes.keys() - files.keys() - names.optional),
        ("holds the unexpected", {files[ours] for ours in files.keys() - names.shapes.keys()}),
    ):
        if found:
            first = min(found)
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UserError(
                f"base weights {folder}: {problem} {first}{more}: the weights are not those of config.json",
                "take both from one model",
            )
    if renamed:
        carried = (name for name in weights.shapes if name not in files.values() and _is_carried(name, names))
        weights = _Renamed(weights, {**files, **{name: name for name in carried}})
    for name, shape in sorted(names.shapes.items()):
        if name not in weights.shapes:
            continue
        weights.dtype(name)  # refuses one that cannot be read
        if tuple(weights.shapes[name]) != tuple(shape):
            raise UserError(
                f"{weights.where(name)}: {name} has shape {list(weights.shapes[name])}, but config.json "
                f"means {list(shape)}",
                "take weights and config.json from one model",
            )
    if names.words is None:
        return weights
    of_words = (names.embedding, names.head, names.head.removesuffix("weight") + "bias")
    return ResizedWeights(weights, names.words, [name for name in of_words if name in weights.shapes])


def _is_carried(name: str, names: BaseNames) -> bool:
    return name not in names.shapes and name.startswith(names.files.carried)


def with_own_head(weights: BaseWeights, names: BaseNames) -> BaseWeights:
    """Return the weights of a model that ties its head, with the embedding as a head of its own."""
    return _Renamed(weights, {**{name: name for name in weights.shapes}, names.head: names.embedding})


def _check_prefix(folder: Path, weights: BaseWeights, files: Mapping[str, str], names: BaseNames) -> None:
    """Raise UserError where the names of the files are those of the model but for what they begin with."""
    if names.shapes.keys() & files.keys():
        return
    probe = max(names.shapes, key=len)  # of a layer
    end = probe.partition(".")[2]  # as the bare model calls it
    for name in weights.shapes:
        for expected in (probe, end):
            if name != expected and name.endswith(f".{expected}"):
                raise UserError(
                    f"base weights {folder}: holds {name} where the model has {probe}: the names have another prefix, "
                    "as in a part of a larger model or a wrapper",
                    f"save the language model itself (save_pretrained of the part that has {probe})",
                )


def has_own_head(folder: str | Path, names: BaseNames) -> bool:
    """Return whether the base weights in `folder`, of a config that ties the head, hold one that is not the embedding.

    Raises UserError where they cannot be read.
    """
    weights = _as_they_lie(Path(folder), names)
    found: dict[str | None, str] = {}
    for name in weights.shapes:
        found[names.files.ours(name, {*names.shapes, names.head})] = name
    if names.head not in found or names.embedding not in found:
        return False
    pair = found[names.head], found[names.embedding]
    shape = tuple(weights.shapes[pair[0]])
    if shape != tuple(weights.shapes[pair[1]]):
        return True
    for start in range(0, shape[0], HEAD_ROWS):
        rows = slice(start, min(start + HEAD_ROWS, shape[0]))
        parts = [torch.empty(rows.stop - start, *shape[1:]) for _ in pair]
        for name, part in zip(pair, parts, strict=True):
            weights.copy(name, (rows, *(slice(0, n) for n in shape[1:])), part)
        if not torch.equal(*parts):
            return True
    return False


def _as_they_lie(folder: Path, names: BaseNames) -> BaseWeights:
    """Return the base weights by the names of their files, safetensors or shards."""
    if has_shards(folder) and not is_hf(folder):
        head = names.shapes.get(names.embedding)  # of a tied model, which some files hold all the same
        return BaseShards(folder, {**({names.head: head} if head else {}), **names.shapes})
    files = HfWeights(folder)
    weights: BaseWeights = QuantisedWeights(files) if is_quantised(files) else files
    weights = Unstacked(weights, names.stacks) if names.stacks else weights
    return Joined(weights, names.joins) if names.joins else weights


def unread_layers(folder: str | Path, names: BaseNames) -> str | None:
    """Return a line on layers in `folder` that predict further tokens, which are not read; None where there are none.

    Raises UserError where the weights cannot be read.
    """
    if not names.files.ahead:
        return None
    ahead = [name for name in _as_they_lie(Path(folder), names).shapes if name.startswith(names.files.ahead)]
    if not ahead:
        return None
    starts = ", ".join(sorted({name.partition(".")[0] for name in ahead}))
    return f"{folder}: layers that only predict further tokens ({starts}) are not loaded"


@torch.no_grad()
def load_base(
    module: nn.Module, folder: str | Path, *, splits: Mapping[str, Split], names: BaseNames
) -> tuple[str, ...]:
    """Fill the base of a stage in place: the weights of its linears, and all parameters but the adapters'.

    Returns a line for each tensor of which some values on this rank are not finite.

    splits  which slice of the whole tensor each parameter is (`named_splits(module)`)
    names   those of the whole model; a tied head is read from the embedding
    Parameters may be uninitialised, of any float dtype, on any device. Beyond them only a block of rows is in
    memory at a time, or one weight where it is quantised. Raises UserError as `open_base`.
    """
    weights = _Watched(open_base(folder, names))
    linears = {
        f"{prefix}.weight": linear for prefix, linear in module.named_modules() if isinstance(linear, ParallelLinear)
    }
    for name, linear in linears.items():
        assert splits[name].global_shape == tuple(weights.shapes[name]), (name, splits[name])
        linear.fill_weight(_Weight(weights, name))
    for name, parameter in module.named_parameters():
        if "lora_" in name or "trainable_tokens" in name or name in linears:
            continue
        source = names.embedding if names.tied and name == names.head else name
        if source in names.optional and source not in weights.shapes:
            continue  # drawn
        split, whole = splits[name], weights.shapes.get(source)
        assert whole is not None and split.global_shape == tuple(whole), (name, split, whole)
        assert tuple(parameter.shape) == split.local_shape, (name, parameter.shape, split)
        for theirs, ours in split.blocks():
            weights.copy(source, theirs, parameter.data[ours])
    return weights.told()


def model_fingerprint(folder: str | Path, names: BaseNames) -> str:
    """Return a SHA-256 over names, shapes, dtypes and a sample of the values of the base weights in `folder`.

    It is the same for an HF folder and for shards of it. Reads a few bytes of each tensor.
    Raises UserError as `open_base`.
    """
    weights = open_base(folder, replace(names, words=None))
    digest = hashlib.sha256()
    for name in sorted(names.shapes.keys() - names.optional):
        shape, dtype = weights.shapes[name], weights.dtype(name)
        digest.update(json.dumps([name, list(shape), str(dtype)]).encode())
        if not shape:  # a number
            digest.update(_sampled(weights, name, ()))
            continue
        for row in sorted({0, shape[0] // 2}):
            rows = 1 if len(shape) > 1 else SAMPLE
            index = (slice(row, min(row + rows, shape[0])), *(slice(0, min(SAMPLE, n)) for n in shape[1:]))
            digest.update(_sampled(weights, name, index))
    return digest.hexdigest()


def _sampled(weights: BaseWeights, name: str, index: tuple[slice, ...]) -> bytes:
    sample = torch.empty([s.stop - s.start for s in index], dtype=weights.dtype(name))
    weights.copy(name, index, sample)
    return sample.view(-1).view(torch.uint8).numpy().tobytes()
