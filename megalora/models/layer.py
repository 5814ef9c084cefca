"""One decoder layer: pre-norm attention and MLP, each with its residual."""

from __future__ import annotations

import torch
from torch import nn

from megalora.lora import ResolvedLora
from megalora.models.attention import SelfAttention
from megalora.models.config import ModelConfig
from megalora.models.inputs import Inputs
from megalora.models.mlp import MLP
from megalora.models.norm import RMSNorm
from megalora.parallel.linear import LinearGroup, Placement

# The layer's inputs to adapted linears, each with its own dropout mask: q k v, o, gate up, down.
SITES_PER_LAYER = 4


class DecoderLayer(nn.Module):
    def __init__(
        self, config: ModelConfig, layer: int, place: Placement, lora: ResolvedLora, recompute_attention: bool
    ):
        super().__init__()
        qkv, o, gate_up, down = range(SITES_PER_LAYER * layer, SITES_PER_LAYER * (layer + 1))
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, place)
        self.self_attn = SelfAttention(config, layer, place, lora, (qkv, o), recompute_attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, place)
        self.mlp = MLP(config, layer, place, lora, (gate_up, down))

    def groups(self) -> tuple[LinearGroup, ...]:
        """Its linears, in groups that read one input."""
        return self.self_attn.qkv, self.self_attn.output, self.mlp.gate_up, self.mlp.down

    def forward(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, inputs: Inputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream is hidden + delta, both [T, hidden_size] (delta None: nothing to add), and so is what
        comes out: sums are left to the norm that reads them."""
        attention, mlp = self.self_attn, self.mlp
        hidden, x = self.input_layernorm.after(hidden, delta, attention.qkv.room)
        hidden, x = self.post_attention_layernorm.after(hidden, attention(x, inputs), mlp.gate_up.room)
        return hidden, mlp(x, inputs)
