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
from megalora.parallel.linear import Placement

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

    def forward(self, hidden: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """hidden [T, hidden_size] -> [T, hidden_size]."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), inputs)
        return hidden + self.mlp(self.post_attention_layernorm(hidden), inputs)
