"""MLPs: gated, down(act(gate) * up), and plain, down(act(up)); up and gate column-parallel, down row-parallel."""

from __future__ import annotations

import torch
from torch import nn

from megalora.models import spec
from megalora.models.blocks.place import LayerPlace
from megalora.models.inputs import Inputs
from megalora.ops.activations import ACTIVATIONS, Activation, gated_activation, scaled, xielu
from megalora.ops.dropout import drop
from megalora.ops.fused_norm import NormWeights
from megalora.ops.step_linear import Beside, is_step
from megalora.ops.swiglu import Made
from megalora.parallel.group import LinearGroup, MLPPair
from megalora.parallel.group_grad import apply_group, apply_pair
from megalora.parallel.split import even_part

INNER_STEP = 8  # in which the inner features are cut: rows of eights are what kernels and GEMMs on GPUs take


class MLPBlock:
    """reduces: of down, as LinearGroup takes it.

    gathered  the input has all tokens, and its gradient is a term of a sum over tp (see LinearGroup)
    site      name of down's input
    """

    def __init__(
        self, mlp: spec.MLP, at: LayerPlace, reduces: bool = True, *, gathered: bool = False, site: str = "down"
    ):
        part = even_part(mlp.inner, at.place.tp, INNER_STEP)
        outputs = [("gate", mlp.gate, part)] if mlp.gate is not None else []
        ups = at.columns([*outputs, ("up", mlp.up, part)])
        down = at.row(mlp.down, part)
        made = None if mlp.fused_act is None else Made(mlp.fused_act, mlp.gate is not None)
        self.up = LinearGroup(ups, at.site("up"), at.place, reduces=not gathered)
        self.down = LinearGroup((down,), at.site(site), at.place, made=made, reduces=reduces)
        self._pair = None if made is None else MLPPair(self.up, self.down)
        self._act: Activation = ACTIVATIONS[mlp.act] if mlp.learned is None else XIELU(mlp, at)
        if mlp.gate_scale != 1.0:
            self._act = scaled(self._act, mlp.gate_scale)
        self._gates = mlp.gate is not None
        self._dropout, self._site, self._start = mlp.dropout, at.site(f"{mlp.down.name} base input"), part.start

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.up, self.down

    @property
    def room(self) -> int:
        """Columns that are wanted behind the input."""
        return self.up.room

    @property
    def output(self) -> LinearGroup:
        return self.down

    def __call__(self, X: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Map X [T, hidden_size + room] to [T, hidden_size], or this rank's term [F, hidden_size] (see LinearGroup)."""
        if self._pair is None:
            return self._of_up(apply_group(self.up, X, inputs.tokens), inputs)
        if inputs.cache is not None and is_step(X):
            found = self._of_step(X, Beside(act=self._gate), inputs)
            if found is not None:
                return found[1]
        return apply_pair(self._pair, X, inputs.tokens, inputs.unread)

    def of_sum(
        self, x: torch.Tensor, delta: torch.Tensor | None, norm: NormWeights, inputs: Inputs
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (x + delta, what the block makes of its norm) of a step of generation, x, delta [T, hidden_size]; None
        where no kernel norms what it reads (see LinearGroup.step)."""
        return self._of_step(x, Beside(delta, norm, self._gate), inputs)

    @property
    def _gate(self) -> str | None:
        """The activation of the gate, where down makes its input of gate and up."""
        made = self.down.made
        return made.act if made is not None and made.gated else None

    def _of_step(self, x: torch.Tensor, beside: Beside, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (x + delta, the block's result) where a kernel does what is beside the first product."""
        found = self.up.step(x, beside, inputs.tokens) if beside.norm is not None or beside.act is not None else None
        if found is None:
            return None
        total, up = found
        if self._pair is None:
            return total, self._of_up(up, inputs)
        return total, self.down.product(up, inputs.tokens, made=beside.act is not None).y

    def _of_up(self, up: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return the result of what gate and up, or up, make [F, (2) I]."""
        inner = gated_activation(up, self._act) if self._gates else self._act(up)
        inner = drop(inner, inputs.tokens.index, inputs.tokens.draw(self._dropout, self._site, self._start))
        return apply_group(self.down, inner, inputs.tokens, inputs.unread)


class XIELU(nn.Module):
    """xIELU with the numbers of this layer, frozen and whole on every tp rank."""

    alpha_p: nn.Parameter
    alpha_n: nn.Parameter
    beta: nn.Parameter
    eps: nn.Parameter

    def __init__(self, mlp: spec.MLP, at: LayerPlace):
        super().__init__()
        for name, shape in mlp.tensors():
            values = torch.empty(shape, dtype=at.place.dtype, device=at.place.device)
            self.register_parameter(name.rpartition(".")[2], nn.Parameter(values, requires_grad=False))
        assert mlp.learned is not None
        at.module(mlp.learned, self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., I] to the same shape."""
        return xielu(x, self.alpha_p, self.alpha_n, self.beta, self.eps)
