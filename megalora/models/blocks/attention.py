"""Self-attention: q, k, v column-parallel by heads, the output row-parallel.

Legend: T tokens on this rank, F tokens of the microbatch, H query heads and K key/value heads of this rank, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megalora.models import spec
from megalora.models.blocks.disentangled import DisentangledPositions
from megalora.models.blocks.place import LayerPlace
from megalora.models.blocks.relative import RelativeBias
from megalora.models.inputs import Angles, Inputs
from megalora.ops.alibi import EXTRA, with_bias, with_rounded_bias
from megalora.ops.attention import MOST_FEATURES, Scores, attention
from megalora.ops.disentangled_attention import Positions, disentangled_attention
from megalora.ops.fused_norm import NormWeights
from megalora.ops.piece_attention import piece_attention
from megalora.ops.probability_dropout import ProbabilityDropout, draw_probabilities
from megalora.ops.rope import rope, split_rope
from megalora.ops.sigmoid_gate import sigmoid_gate
from megalora.ops.step_linear import Beside
from megalora.parallel.group import LinearGroup
from megalora.parallel.group_grad import apply_group
from megalora.parallel.split import Part, cut_heads, kv_copies


class AttentionBlock:
    """reduces: of the output, as LinearGroup takes it."""

    def __init__(self, attention: spec.Attention, at: LayerPlace, reduces: bool = True):
        self.layer, self.spec, self.recompute = at.index, attention, at.recompute == "selective"
        dim = attention.head_dim
        cut = cut_heads(attention.heads, attention.kv_heads, at.place.tp)
        outputs = [("q", attention.q, cut.query), ("k", attention.k, cut.kv), ("v", attention.v, cut.kv)]
        outputs = outputs[:2] if attention.one_for_both else outputs
        if attention.gate is not None:
            outputs.insert(0, ("gate", attention.gate, cut.query))
        # The rows of a linear that is not fused are counted in features.
        qkv = at.columns([
            (name, made, part if isinstance(made, spec.Fused) else part.times(dim)) for name, made, part in outputs
        ])  # fmt: skip
        out = at.row(attention.out, cut.query.times(dim))
        self.qkv = LinearGroup(qkv, at.site("qkv"), at.place)
        self.output = LinearGroup((out,), at.site("out"), at.place, reduces=reduces)
        self.heads, self.kv_heads = cut.query.size, cut.kv.size
        # Which of this rank's KV heads each of its query heads reads; None where all are read equally often, in order.
        reads = [
            h * attention.kv_heads // attention.heads - cut.kv.start for h in range(cut.query.start, cut.query.stop)
        ]
        each = self.heads // self.kv_heads
        self.reads = None if reads == [h // each for h in range(len(reads))] else reads
        copies = kv_copies(attention.heads, attention.kv_heads, at.place.tp)
        self.q_norm = self.k_norm = None
        if attention.q_norm is not None:
            self.q_norm = at.head_norm(attention.q_norm, dim, cut.query, [1] * self.heads)
        if attention.k_norm is not None:
            self.k_norm = at.head_norm(attention.k_norm, dim, cut.kv, copies)
        self.v_norm = None if attention.v_norm is None else at.norm(attention.v_norm)
        self.slopes = slopes = self.relative = self.positions = None
        if isinstance(attention.position, spec.RelativeTable):
            self.relative = RelativeBias(at.root, attention.position, attention.heads, cut.query, at.place)
        if isinstance(attention.position, spec.Disentangled):
            self.positions = DisentangledPositions(attention, cut.query, self.qkv, at)
        if isinstance(attention.position, spec.Alibi):
            own = attention.position.slopes[cut.query.start : cut.query.stop]
            self.slopes = torch.tensor(own, dtype=at.place.master_dtype, device=at.place.device)
            slopes = None if attention.position.rounded else self.slopes
        sinks = None if attention.sinks is None else self._of_heads(attention.sinks, attention, at, cut.query, 1)
        self.biases = [
            None if name is None else self._of_heads(name, attention, at, cut.query, dim)
            for name in (attention.q_bias, attention.v_bias)
        ]
        self.scores = Scores(attention.scale, attention.softcap, slopes, attention.causal, sinks=sinks)
        # With ALiBi's bias among the features of q and k, the scale is that of the heads without them.
        scale = dim**-0.5 if attention.scale is None else attention.scale
        self.widened = Scores(scale, attention.softcap, None, attention.causal)
        heads = range(cut.query.start, cut.query.stop)
        sites = [at.site(f"{attention.out.name}.probabilities.{head}") for head in heads]
        self.sites = torch.tensor(sites, device=at.place.device)

    @staticmethod
    def _of_heads(name: str, attention: spec.Attention, at: LayerPlace, heads: Part, size: int) -> nn.Parameter:
        """Build the frozen tensor `name` of this rank's heads, `size` features each."""
        assert name != attention.sinks or not isinstance(attention.position, spec.Alibi)
        own = torch.empty(heads.size * size, dtype=at.place.dtype, device=at.place.device)
        found = nn.Parameter(own, requires_grad=False)
        at.parameter(name, found, heads.times(size).cut().split((attention.heads * size,), 0))
        return found

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return (self.qkv, self.output, *(() if self.positions is None else self.positions.groups))

    @property
    def room(self) -> int:
        """Columns that are wanted behind the input."""
        return self.qkv.room

    def __call__(self, X: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Map X [T, hidden_size + room] to [T, hidden_size], or this rank's term [F, hidden_size] (see LinearGroup)."""
        return self._of_qkv(apply_group(self.qkv, X, inputs.tokens), inputs)

    def of_sum(
        self, x: torch.Tensor, delta: torch.Tensor | None, norm: NormWeights, inputs: Inputs
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (x + delta, what the block makes of its norm) of a step of generation, x, delta [T, hidden_size]; None
        where no kernel norms what it reads (see LinearGroup.step)."""
        found = self.qkv.step(x, Beside(delta, norm), inputs.tokens)
        return None if found is None else (found[0], self._of_qkv(found[1], inputs))

    def _of_qkv(self, qkv: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return the result of q, k and v, as `_core` takes them."""
        positions = None if self.positions is None else self.positions(inputs)
        if self.recompute and torch.is_grad_enabled():
            context = checkpoint(self._core, qkv, inputs, positions, use_reentrant=False, preserve_rng_state=False)
        else:
            context = self._core(qkv, inputs, positions)
        return apply_group(self.output, context, inputs.tokens)

    def _core(self, qkv: torch.Tensor, inputs: Inputs, positions: Positions | None) -> torch.Tensor:
        """Map qkv [F, (H + 2 K) D], with the gate [F, H D] in front where there is one, to [F, H D]. Where values are
        what k makes, qkv is [F, (H + K) D]."""
        if self.spec.gate is None:
            return self._context(qkv, inputs, positions)
        gate, qkv = qkv.split([self.heads * self.spec.head_dim, qkv.shape[1] - self.heads * self.spec.head_dim], -1)
        return sigmoid_gate(self._context(qkv, inputs, positions), gate)

    def _context(self, qkv: torch.Tensor, inputs: Inputs, positions: Positions | None) -> torch.Tensor:
        """Return the result of attention [F, H D]."""
        window, scores, dim = self.spec.window, self.scores, self.spec.head_dim
        if self.spec.one_for_both:
            qkv = torch.cat([qkv, qkv[:, self.heads * dim :]], -1)
        if self.spec.clip is not None:
            qkv = qkv.clamp(-self.spec.clip, self.spec.clip)
        angles = self._turned_by_cache(qkv, inputs)
        q, k, v = self._heads(qkv) if angles is not None else self._rotated(qkv, inputs)
        if self.reads is not None:
            k, v = k[:, self.reads], v[:, self.reads]
        tokens = inputs.tokens
        dropout = draw_probabilities(tokens.draw(self.spec.dropout, 0), self.sites, tokens.index)
        q, v = (x if bias is None else x + bias.view_as(x[0]) for x, bias in zip((q, v), self.biases, strict=True))
        if positions is not None:
            return self._disentangled(q, k, v, positions, inputs, dropout)
        in_one_call = inputs.packed is not None and dim + EXTRA <= MOST_FEATURES
        widens = scores.slopes is None or inputs.context is not None or (in_one_call and dropout is None)
        if self.slopes is not None and widens:
            scores = self.widened
            q, k, v = self._with_bias(q, k, v, inputs)
        if self.relative is not None:
            scores = replace(scores, offsets=self.relative())
        if inputs.cache is not None:
            context = inputs.cache.attend(self.layer, q, k, v, window, scores, self.spec.chunk, angles)
        else:
            bounds, packed = inputs.bounds, inputs.packed
            if self.spec.chunk is not None:  # documents, each cut into chunks
                bounds, packed = inputs.chunks[self.spec.chunk]
            pieces = None
            if inputs.context is not None:
                assert dropout is None, "check_context refuses it"
                k, v, pieces = inputs.context.gather(k, v, window)

            def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                if pieces is not None:
                    return piece_attention(q, k, v, pieces, window, scores)
                return attention(q, k, v, bounds, window, packed, scores, dropout)

            context = inputs.attend(attend, q, k, v)
        return context[..., :dim].flatten(1)

    def _disentangled(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: Positions,
        inputs: Inputs,
        dropout: ProbabilityDropout | None,
    ) -> torch.Tensor:
        """Return the attention [F, H D] whose scores know content and position apart."""
        assert inputs.cache is None and inputs.context is None and self.reads is None

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
            terms = iter(more)
            keys, queries = (None if x is None else next(terms) for x in (positions.keys, positions.queries))
            given = replace(positions, keys=keys, queries=queries)
            return disentangled_attention(q, k, v, given, inputs.bounds, self.scores, dropout, inputs.packed)

        terms = [x for x in (positions.keys, positions.queries) if x is not None]
        return inputs.attend(attend, q, k, v, *terms).flatten(1)

    def _with_bias(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: Inputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k and v with features that carry ALiBi's bias, for kernels that know of none."""
        assert isinstance(self.spec.position, spec.Alibi)
        if self.spec.position.rounded:
            return with_rounded_bias(q, k, v, self.slopes, inputs.position_ids)
        return with_bias(q, k, v, self.slopes, inputs.position_ids, self.widened.scale)

    def _heads(self, qkv: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return q [F, H, D] and k, v [F, K, D] of qkv, as views."""
        heads = [self.heads, self.kv_heads, self.kv_heads]
        return qkv.unflatten(-1, (-1, self.spec.head_dim)).split(heads, dim=1)

    @property
    def _only_turns(self) -> bool:
        """Whether all that is done to q and k before attention is to rotate them."""
        plain = self.q_norm is None and self.v_norm is None and self.spec.temperature is None
        return plain and isinstance(self.spec.position, spec.Rotary)

    def _turned_by_cache(self, qkv: torch.Tensor, inputs: Inputs) -> Angles | None:
        """Return cos and sin [F, D / 2] where the kernel of attention over the cache rotates q and k, else None."""
        if inputs.cache is None or not self._only_turns or any(one is not None for one in (*self.biases, self.reads)):
            return None
        assert isinstance(self.spec.position, spec.Rotary)
        cos, sin = inputs.tables[self.spec.position]
        whole = not self.spec.position.interleaved and 2 * cos.shape[1] == self.spec.head_dim
        plain = self.scores.simple and self.scores.scale is None and self.spec.chunk is None
        group = self.heads // self.kv_heads
        return (cos, sin) if whole and plain and inputs.cache.turns(qkv, group, self.spec.head_dim) else None

    def _rotated(self, qkv: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the heads of qkv, q [F, H, D] and k, v [F, K, D], with q and k normed and rotated."""
        position = self.spec.position if isinstance(self.spec.position, spec.Rotary) else None
        if position is not None and self._only_turns:
            tables = inputs.tables[position]
            return split_rope(qkv, *tables, self.heads, self.kv_heads, position.interleaved)
        q, k, v = self._heads(qkv)
        v = v if self.v_norm is None else self.v_norm(v)
        if self.q_norm is not None and not self.spec.turns_first:
            q, k = self.q_norm(q), self.k_norm(k)
        if position is not None:
            q, k = (rope(x, *inputs.tables[position], position.interleaved) for x in (q, k))
        if self.q_norm is not None and self.spec.turns_first:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.temperature is not None:
            q = q * temperatures(self.spec.temperature, inputs.position_ids, q.dtype)
        return q, k, v


def temperatures(made: spec.Temperature, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what q is multiplied by at these positions [F, 1, 1]."""
    wide = position_ids.to(torch.promote_types(dtype, torch.float32))
    return (1 + made.scale * torch.log1p(torch.floor((wide + made.first) / made.step))).to(dtype)[:, None, None]
