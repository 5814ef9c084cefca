"""The gated MLP: gate and up column-parallel, down row-parallel."""

from __future__ import annotations

import torch
from torch import nn

from megalora.lora import ResolvedLora
from megalora.models.config import ModelConfig
from megalora.models.inputs import Inputs
from megalora.parallel.linear import ColumnParallelLinear, GatedPair, LinearGroup, Placement, RowParallelLinear
from megalora.parallel.split import even_part


INNER_STEP = 8  # in which intermediate_size is cut: rows of eights are what kernels and GEMMs on GPUs take


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, place: Placement, lora: ResolvedLora, sites: tuple[int, int]):
        super().__init__()

        def options(short: str) -> dict:
            name = f"model.layers.{layer}.mlp.{short}"
            return {
                "name": name,
                "bias": config.mlp_bias,
                "adapter": lora.adapter(name),
                "trains_bias": lora.trains_bias(name),
                "place": place,
                "part": even_part(config.intermediate_size, place.tp, INNER_STEP),
            }

        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = ColumnParallelLinear(in_features=size, out_features=inner, **options("gate_proj"))
        self.up_proj = ColumnParallelLinear(in_features=size, out_features=inner, **options("up_proj"))
        self.down_proj = RowParallelLinear(in_features=inner, out_features=size, **options("down_proj"))

        self.gate_up = LinearGroup((self.gate_proj, self.up_proj), sites[0], place)
        self.down = LinearGroup((self.down_proj,), sites[1], place, gated=True)
        self.pair = GatedPair(self.gate_up, self.down)

    def forward(self, X: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """X [T, hidden_size + gate_up.room] -> [T, hidden_size]."""
        return self.pair(X, inputs.tokens)
