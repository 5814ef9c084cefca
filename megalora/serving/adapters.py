"""Adapters for a server: read and held against the base, at the start or while it runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megalora.adapters.config import LoraConfig, ResolvedLora
from megalora.adapters.shared import Room
from megalora.building import check_adapter, named_splits, resolve_lora
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.choices import CLASSIFICATION
from megalora.data.tokenizer import open_tokenizer
from megalora.errors import UserError
from megalora.generation.requests import Change
from megalora.identity import adapter_for, adapter_template, base_identity, check_base, other_base
from megalora.models.spec import Experts, ModelSpec, mixers_of
from megalora.models.stage import Stage
from megalora.vocabulary import adapter_tokens

_ONE_FOR_ALL = ("bias", "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter as it was read. template: the source of its own chat template; notes: lines for the user."""

    lora: ResolvedLora
    tensors: Mapping[str, torch.Tensor]
    template: str | None
    notes: tuple[str, ...]


class AdapterReader:
    """Reads adapters of a base. For one rank.

    model_path, weights  folders of the tokenizer and of the base weights; base_format: as the linears hold these
    """

    def __init__(self, config: ModelSpec, model_path: str, weights: str, base_format: str):
        self._config, self._model_path, self._weights, self._base_format = config, model_path, weights, base_format

    def read(self, name: str, folder: str) -> ReadAdapter:
        """Return the adapter `name` of a folder. Raises UserError where it is none that this base can share."""
        adapter = adapter_for(folder, self._model_path)
        task = adapter.lora_config.get("task_type")
        if task in CLASSIFICATION:  # told first: the base with its head has another identity
            raise UserError(
                f"adapter {name} ({adapter.where}) is of task_type {task}, which writes no text",
                "name an adapter of task_type CAUSAL_LM",
            )
        if added := adapter_tokens(adapter, self._model_path):
            raise _not_shared(name, adapter, f"new tokens ({', '.join(token.content for token in added)})")
        check_base(adapter, self._identity)
        notes = (*adapter.notes, *other_base(adapter, self._base_format, self._model_path))
        lora = _resolved(name, adapter, self._config)
        check_adapter(adapter.tensors, lora, self._config, adapter.where)
        check_shared(name, adapter, self._config)
        return ReadAdapter(lora, adapter.tensors, adapter_template(adapter), notes)

    @functools.cached_property
    def _identity(self) -> dict[str, str]:
        return base_identity(self._config, self._weights, open_tokenizer(self._model_path).tokenizer)


def _resolved(name: str, adapter: AdapterCheckpoint, config: ModelSpec) -> ResolvedLora:
    lora_config = LoraConfig.from_dict(adapter.lora_config, adapter.where, trained=True)
    for field in _ONE_FOR_ALL:
        if (value := getattr(lora_config, field)) not in (None, False, "none", (), {}):
            raise _not_shared(name, adapter, f"{field} = {value!r}")
    try:
        return resolve_lora(lora_config, config)
    except UserError as error:
        raise UserError(
            f"adapter {adapter.where}: is of another model ({error.message})", "name an adapter of this model"
        ) from None


def check_shared(name: str, adapter: AdapterCheckpoint, config: ModelSpec) -> None:
    """Raise UserError where an adapter has more than A and B of the layers' linears: the rest is one for all tokens."""
    for tensor in adapter.tensors:
        linear, factor = tensor.rsplit(".lora_", 1) if ".lora_" in tensor else (tensor, "")
        if linear not in config.linears or factor not in ("A.weight", "B.weight"):
            raise _not_shared(name, adapter, tensor)


def _not_shared(name: str, adapter: AdapterCheckpoint, what: str) -> UserError:
    return UserError(
        f"adapter {name} ({adapter.where}) has {what}, which requests of several adapters in one batch cannot share",
        "merge it (megalora convert adapter merge) and serve the merged model",
    )


def room_for(adapters: int, rank: int, config: ModelSpec, of_experts: bool) -> Room:
    """Return room for `adapters` adapters of up to `rank` on every linear, those of experts only where `of_experts`."""
    left_out = frozenset() if of_experts else linears_of_experts(config)
    return Room(adapters, rank, tuple(name for name in config.linears if name not in left_out))


def linears_of_experts(config: ModelSpec) -> frozenset[str]:
    """Return the full names of the linears that experts have of their own."""
    return frozenset(
        config.stack.of_layer(index, linear.name)
        for index, layer in enumerate(config.stack.layers)
        for mixer in mixers_of(layer)
        if isinstance(mixer, Experts)
        for expert in range(mixer.count)
        for linear in mixer.at(expert).linears
    )


@torch.no_grad()
def put_adapters(stage: Stage, room: Room, changes: Sequence[Change], empty: bool = False) -> None:
    """Let adapters of `room` be others from now on: their factors change in place on this rank's stage.

    empty  the other places are made empty too: they are not initialised yet
    """
    splits = named_splits(stage)
    for parameter in stage.trainable().values() if empty else ():
        parameter.zero_()
    for change in changes:
        first, stop = (change.number - 1) * room.rank, change.number * room.rank
        for name, parameter in stage.trainable().items():
            split, dim = splits[name], room.dim(name)  # never the one that tensor parallelism cuts
            mine = parameter.narrow(dim, first, stop - first)
            mine.zero_()
            if (part := change.tensors.get(name)) is not None:
                whole = torch.zeros(split.global_shape, dtype=parameter.dtype)
                whole.narrow(dim, first, part.shape[dim]).copy_(part)
                mine.copy_(split.slice(whole).narrow(dim, first, stop - first))
    stage.refresh_adapters(in_place=True)
