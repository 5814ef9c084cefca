"""Self-attention: q, k, v column-parallel by heads, o row-parallel.

Legend: T tokens on this rank, F tokens of the microbatch, H query heads and K key/value heads of this rank, D head_dim.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megalora.lora import ResolvedLora
from megalora.models.config import ModelConfig, cut_heads
from megalora.models.inputs import Inputs
from megalora.models.norm import RMSNorm
from megalora.ops.attention import attention
from megalora.ops.rope import rope, split_rope
from megalora.parallel.linear import ColumnParallelLinear, LinearGroup, Placement, RowParallelLinear
from megalora.parallel.split import Part


class SelfAttention(nn.Module):
    """recompute: run the rotation and the attention again in backward instead of keeping what they keep."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        place: Placement,
        lora: ResolvedLora,
        sites: tuple[int, int],
        recompute: bool,
    ):
        super().__init__()
        self.layer, self.head_dim, self.recompute = layer, config.head_dim, recompute
        self.window = config.sliding_windows[layer]
        prefix = f"model.layers.{layer}.self_attn"
        size, dim = config.hidden_size, config.head_dim

        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        cut = cut_heads(config, place.tp)

        def column(short: str, heads: int, part: Part) -> ColumnParallelLinear:
            name = f"{prefix}.{short}"
            return ColumnParallelLinear(
                name, size, heads * dim, part.times(dim), bias=config.qkv_bias, adapter=lora.adapter(name),
                trains_bias=lora.trains_bias(name), place=place,
            )  # fmt: skip

        self.q_proj = column("q_proj", heads, cut.query)
        self.k_proj = column("k_proj", kv_heads, cut.kv)
        self.v_proj = column("v_proj", kv_heads, cut.kv)
        name = f"{prefix}.o_proj"
        self.o_proj = RowParallelLinear(
            name, heads * dim, size, cut.query.times(dim), bias=config.output_bias, adapter=lora.adapter(name),
            trains_bias=lora.trains_bias(name), place=place,
        )  # fmt: skip
        self.qkv = LinearGroup((self.q_proj, self.k_proj, self.v_proj), sites[0], place)
        self.output = LinearGroup((self.o_proj,), sites[1], place)
        self.heads, self.kv_heads = cut.query.stop - cut.query.start, cut.kv.stop - cut.kv.start
        # Which of this rank's KV heads each of its query heads reads; None where all are read equally often, in order.
        reads = [h * kv_heads // heads - cut.kv.start for h in range(cut.query.start, cut.query.stop)]
        each = self.heads // self.kv_heads
        self.reads = None if reads == [h // each for h in range(len(reads))] else reads
        self.q_norm = RMSNorm(dim, config.rms_norm_eps, place) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.rms_norm_eps, place) if config.qk_norm else None

    def forward(self, X: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """X [T, hidden_size + qkv.room] -> [T, hidden_size]."""
        qkv = self.qkv(X, inputs.tokens)
        if self.recompute and torch.is_grad_enabled():
            context = checkpoint(self._core, qkv, inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            context = self._core(qkv, inputs)
        return self.output(context, inputs.tokens)

    def _core(self, qkv: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """qkv [F, (H + 2 K) D] -> [F, H D]."""
        if self.q_norm is None:
            q, k, v = split_rope(qkv, inputs.cos, inputs.sin, self.heads, self.kv_heads)
        else:
            cut = [self.heads, self.kv_heads, self.kv_heads]
            q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(cut, dim=1)
            q, k = rope(self.q_norm(q), inputs.cos, inputs.sin), rope(self.k_norm(k), inputs.cos, inputs.sin)
        if self.reads is not None:
            k, v = k[:, self.reads], v[:, self.reads]
        if inputs.cache is not None:
            return inputs.cache.attend(self.layer, q, k, v, self.window).flatten(1)
        return attention(q, k, v, inputs.bounds, self.window, inputs.packed).flatten(1)
