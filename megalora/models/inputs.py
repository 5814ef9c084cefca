"""What the layers of a stage read besides the hidden states: the same for every layer of one microbatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megalora.batch import Batch, to_device
from megalora.models.config import ModelConfig
from megalora.ops.attention import Packed, pack
from megalora.parallel.linear import Placement, Tokens


class Cache(Protocol):
    """Keys and values of earlier tokens (generation)."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        """Keeps k, v [F, K, D] of the new tokens of `layer`; attention of q [F, H, D] over all tokens kept."""
        ...


@dataclass(frozen=True)
class Inputs:
    """One microbatch as the layers see it.

    input_ids  [F] int64
    labels     [F] int64, shifted, or None where no loss is asked for
    labelled   [L] int64, the places where labels is not -100, or None as labels
    bounds     cumulative document bounds in F, as ints
    cos, sin   [F, head_dim / 2] in the compute dtype
    tokens     places of the tokens and what dropout is drawn from
    cache      earlier keys and values, or None (training)
    packed     the bounds for kernels that read them on the device, where some do
    """

    input_ids: torch.Tensor
    labels: torch.Tensor | None
    labelled: torch.Tensor | None
    bounds: tuple[int, ...]
    cos: torch.Tensor
    sin: torch.Tensor
    tokens: Tokens
    cache: Cache | None = None
    packed: Packed | None = None


def rope_tables(config: ModelConfig, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(cos, sin) [F, head_dim / 2] of positions [F]; angles in float32, as HF computes them."""
    frequencies = to_device(torch.tensor(config.rope_inverse_frequencies, dtype=torch.float32), position_ids.device)
    angles = position_ids.to(torch.float32).unsqueeze(-1) * frequencies
    factor = config.rope_attention_factor
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def training_inputs(batch: Batch, config: ModelConfig, place: Placement, *, seed: int | None, step: int) -> Inputs:
    """The Inputs of a microbatch; seed None switches dropout off (evaluation)."""
    # Before the copy to the device: reading these there would wait for it.
    bounds = tuple(batch.cu_seqlens.tolist())
    packed = pack(bounds, config.head_dim, place.dtype, torch.device(place.device))
    labelled = to_device((batch.labels != -100).nonzero().squeeze(-1), place.device)
    batch = batch.to(place.device)
    cos, sin = rope_tables(config, batch.position_ids, place.dtype)
    index = batch.token_index
    tokens = Tokens(index, place.own_tokens(index), seed, step)
    return Inputs(batch.input_ids, batch.labels, labelled, bounds, cos, sin, tokens, packed=packed)
