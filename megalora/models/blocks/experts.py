"""Experts: a router, whole experts on each tp rank, and the MLP that all tokens go through, in one sum over tp.

The tokens are gathered as for a dense MLP, every rank routes all of them and computes its own experts, and one
reduction sums them: the messages of a dense MLP. The router is whole on every rank.

Legend: T tokens on this rank, F tokens of the microbatch, E experts in all, k choices of each token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from megalora.adapters.sharing import SHARED
from megalora.models import spec
from megalora.models.blocks.mlp import MLPBlock
from megalora.models.blocks.place import LayerPlace
from megalora.models.inputs import Inputs
from megalora.models.routers import Router
from megalora.ops.routing import take
from megalora.ops.weighted_gate import SCALED_INPUT, Clamped, Gate, Gated, Plain
from megalora.parallel.experts import ExpertGroup, share_storage
from megalora.parallel.experts_grad import ExpertPair, apply_experts, gather_tokens
from megalora.parallel.formats import BaseFormat
from megalora.parallel.group import LinearGroup
from megalora.parallel.group_grad import apply_group, reduce_terms
from megalora.parallel.split import shard_range


class ExpertsBlock:
    """reduces: of the sum, as LinearGroup takes it."""

    room = 0  # columns that are wanted behind the input: rows of experts are copies of it

    def __init__(self, experts: spec.Experts, at: LayerPlace, reduces: bool = True):
        self.place, self.reduces = at.place, reduces
        self.router = RouterBlock(experts, at)
        self.scale = _frozen(experts.reads_scaled, experts.router.linear.in_features, at.place.dtype, at)
        first, stop = shard_range(experts.count, at.place.tp.rank, at.place.tp.size)
        mlps = [experts.at(index) for index in range(first, stop)]
        linears = [[at.expert(linear) for linear in mlp.linears] for mlp in mlps]
        if factors := SHARED[at.lora.config.expert_lora]:
            for part in zip(*linears, strict=True):
                at.share_factors(part, factors)
        share_storage([linear for own in linears for linear in own])
        up = ExpertGroup([own[:-1] for own in linears], at.site("up"), at.place)
        down = ExpertGroup([own[-1:] for own in linears], at.site("experts.down"), at.place)
        self.experts = ExpertPair(up, down, first, _gate_of(experts))
        self.shared, self.shared_scale = None, experts.shared_scale
        if experts.shared is not None:
            assert self.shared_scale == 1.0 or not experts.shared.down.bias, experts
            self.shared = MLPBlock(experts.shared, at, reduces=False, gathered=True, site="shared.down")
        self.gate = None
        if experts.shared_gate is not None:
            gate = at.replicated(experts.shared_gate)
            self.gate = LinearGroup((gate,), at.site("up"), at.place, reduces=False)

    @property
    def groups(self) -> tuple[LinearGroup | ExpertGroup, ...]:
        shared = () if self.shared is None else self.shared.groups
        gate = () if self.gate is None else (self.gate,)
        return (self.router.group, self.experts.up, self.experts.down, *shared, *gate)

    def __call__(self, X: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Map X [T, hidden_size] to [T, hidden_size], or this rank's term [F, hidden_size] (see LinearGroup)."""
        x = gather_tokens(X, self.place)
        weights, chosen = self.router(x, inputs)
        if self.scale is not None:
            x = x * self.scale
        terms = apply_experts(self.experts, x, weights, chosen, inputs.tokens)
        biases = []
        if self.shared is not None:
            shared = self.shared(x, inputs)
            if self.gate is not None:
                shared = shared * torch.sigmoid(apply_group(self.gate, x, inputs.tokens))
            terms = terms + (shared if self.shared_scale == 1.0 else shared * self.shared_scale)
            biases = [self.shared.output.bias]
        return reduce_terms(terms, self.place, biases) if self.reduces and self.place.tp.size > 1 else terms


def _gate_of(experts: spec.Experts) -> Gate:
    """Return what stands between up and down of an expert."""
    mlp = experts.expert
    if mlp.gate is None:
        assert not experts.weighs_input and mlp.clamp is None, mlp
        return Plain(mlp.act)
    alternates = isinstance(mlp.up, spec.Fused) and isinstance(mlp.up.rows, spec.ByHead)
    assert alternates == (mlp.clamp is not None) and mlp.fused_act is not None, mlp
    assert mlp.fused_act == "silu" or not (experts.weighs_input or alternates), mlp
    if experts.weighs_input:
        return SCALED_INPUT
    return Gated(mlp.fused_act) if mlp.clamp is None else Clamped(*mlp.clamp)


def _frozen(name: str | None, size: int, dtype: torch.dtype, at: LayerPlace) -> nn.Parameter | None:
    """Build the frozen tensor `name` [size] of the layer, whole on every rank; None: there is none."""
    if name is None:
        return None
    values = nn.Parameter(torch.empty(size, dtype=dtype, device=at.place.device), requires_grad=False)
    at.parameter(name, values)
    return values


class RouterBlock:
    """Weights and experts of each token, the same on every tp rank: all compute the same of the same tokens.

    load  [E] int64, how often each expert was chosen in training since it was last read
    """

    def __init__(self, experts: spec.Experts, at: LayerPlace):
        self.spec, self.count = experts.router, experts.count
        self.name = at.stack.of_layer(at.index, self.spec.linear.name)
        self.wide = torch.promote_types(at.place.dtype, torch.float32)
        self.dtype = self.wide if self.spec.wide else at.place.dtype
        at = replace(at, place=replace(at.place, dtype=self.dtype, base=BaseFormat()))  # never quantised
        self.group = LinearGroup((at.replicated(self.spec.linear),), at.site("up"), at.place, reduces=False)
        self.correction: nn.Parameter | None = None
        if self.spec.correction is not None:
            shape = (1, self.count) if self.spec.correction_row else (self.count,)
            values = torch.empty(shape, dtype=self.wide, device=at.place.device)
            self.correction = nn.Parameter(values, requires_grad=False)
            at.parameter(self.spec.correction, self.correction)
        size = self.spec.linear.in_features
        self.scale = _frozen(self.spec.reads_scaled, size, at.place.dtype, at)
        self.of_expert = _frozen(self.spec.of_expert, self.count, at.place.dtype, at)
        self.load = torch.zeros(self.count, dtype=torch.int64, device=at.place.device)

    def __call__(self, x: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Map x [F, hidden_size] to (weights [F, k] of float32 or float64, chosen [F, k] int64)."""
        router = self.spec
        if self.scale is not None:
            x = x * self.scale * router.input_factor
        logits = apply_group(self.group, x.to(self.dtype), inputs.tokens).to(self.wide)
        if router.jitter is not None:
            chosen = self._chosen(logits.detach(), inputs)
            return nearly_equal_shares(logits, chosen, router.jitter) * router.scale, chosen
        scores = torch.softmax(logits, -1) if router.score == "softmax" else torch.sigmoid(logits)
        chosen = self._chosen((logits if router.by_logits else scores).detach(), inputs)
        weights = take(scores, chosen)
        if router.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + router.epsilon)
        weights = weights * router.scale
        return (weights if self.of_expert is None else weights * self.of_expert[chosen].to(weights.dtype)), chosen

    def _chosen(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        if inputs.chosen is not None and self.name in inputs.chosen:
            return inputs.chosen[self.name]
        chosen = choose(scores if self.correction is None else scores + self.correction, self.spec)
        if inputs.chosen is not None:
            inputs.chosen[self.name] = chosen
        if inputs.tokens.seed is not None:
            self.load.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        return chosen


def nearly_equal_shares(logits: torch.Tensor, chosen: torch.Tensor, jitter: float) -> torch.Tensor:
    """Return the weights [F, k] of `chosen` [F, k] by logits [F, E] (Liu et al. 2024, arXiv 2409.12136, in evaluation).

    Of those not chosen before, logits that are less than the greatest by more than 2 jitter are out, as a share of the
    absolute value of each, or of the greatest where that is more.
    """
    found, left = [], logits
    for one in chosen.split(1, -1):
        with torch.no_grad():
            greatest = left.gather(-1, one)
            far = (greatest - logits) / torch.maximum(logits.abs(), greatest) > 2 * jitter
        shares = torch.softmax(left.masked_fill(far, -torch.inf), -1)
        found.append(shares.gather(-1, one))
        left = left.scatter(-1, one, -torch.inf)
    return torch.cat(found, -1)


def choose(scores: torch.Tensor, router: Router) -> torch.Tensor:
    """Return the experts [F, k] of each token by scores [F, E], best first, ties to the lower index."""
    if router.groups > 1:
        grouped = scores.unflatten(1, (router.groups, -1))
        worth = grouped.topk(router.group_top, -1).values.sum(-1)
        kept = worth.sort(dim=-1, descending=True, stable=True).indices[:, : router.kept_groups]
        allowed = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, kept, True)
        scores = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, : router.top]
