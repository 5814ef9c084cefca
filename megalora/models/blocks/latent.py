"""Latent attention (MLA): the projections to latents whole on every rank, over its own tokens; those up from them cut
by heads, the output row-parallel.

In generation the cache holds a token's latent and its rotated key features, one vector for all heads, and the products
with kv_up move to the queries and the result: q k = (q U_k) latent, and p v = (p latent) U_v.

Legend: T tokens on this rank, F tokens of the microbatch, H heads of this rank, L features of the latent of keys and
values, P plain and R turned features of a query head, V features of a value head.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from megalora.models import spec
from megalora.models.blocks.attention import temperatures
from megalora.models.blocks.place import LayerPlace
from megalora.models.inputs import Inputs
from megalora.ops.attention import Scores, attention
from megalora.ops.piece_attention import piece_attention
from megalora.ops.rope import rope
from megalora.parallel.experts_grad import gather_tokens
from megalora.parallel.group import LinearGroup
from megalora.parallel.group_grad import apply_group
from megalora.parallel.split import even_part


class LatentAttentionBlock:
    """reduces: of the output, as LinearGroup takes it."""

    def __init__(self, attention: spec.LatentAttention, at: LayerPlace, reduces: bool = True):
        self.layer, self.spec, self.place = at.index, attention, at.place
        self.recompute = at.recompute == "selective"
        part = even_part(attention.heads, at.place.tp)
        self.heads = self.kv_heads = part.size
        q_up = at.column(attention.q_up, part.times(attention.head_dim))
        kv_down = at.token(attention.kv_down)
        site = at.site("qkv")
        if attention.q_down is None:
            self.direct: LinearGroup | None = LinearGroup((q_up,), site, at.place)
            self.down = LinearGroup((kv_down,), site, at.place)
        else:
            self.direct = None
            self.down = LinearGroup((at.token(attention.q_down), kv_down), site, at.place)
            self.q_norm = at.norm(attention.q_norm)
            self.q_up = LinearGroup((q_up,), at.site("attention.q_latent"), at.place)
        self.kv_norm = at.norm(attention.kv_norm)
        kv_up = at.column(attention.kv_up, part.times(attention.plain + attention.value))
        self.kv_up = LinearGroup((kv_up,), at.site("attention.kv_latent"), at.place)
        out = at.row(attention.out, part.times(attention.value))
        self.output = LinearGroup((out,), at.site("out"), at.place, reduces=reduces)
        self.scores = Scores(attention.head_dim**-0.5 if attention.scale is None else attention.scale)

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        q = (self.down, self.q_up) if self.direct is None else (self.direct, self.down)
        return (*q, self.kv_up, self.output)

    @property
    def room(self) -> int:
        """Columns that are wanted behind the input."""
        return (self.down if self.direct is None else self.direct).room

    def __call__(self, X: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Map X [T, hidden_size + room] to [T, hidden_size], or this rank's term [F, hidden_size] (see LinearGroup)."""
        L, R, tokens = self.spec.latent, self.spec.turned, inputs.tokens
        if self.direct is None:
            latent_q, latent, turned = apply_group(self.down, X, tokens).split([self.q_norm.weight.shape[0], L, R], -1)
            q = apply_group(self.q_up, self.q_norm(latent_q, self.q_up.room), tokens)
        else:
            q = apply_group(self.direct, X, tokens)
            latent, turned = apply_group(self.down, X[:, : self.down.in_features], tokens).split([L, R], -1)
        turned = gather_tokens(turned, self.place)
        if inputs.cache is not None:
            context = self._cached(q, self.kv_norm(latent), turned, inputs)
        else:
            kv = apply_group(self.kv_up, self.kv_norm(latent, self.kv_up.room), tokens)
            if self.recompute and torch.is_grad_enabled():
                arguments = q, kv, turned, inputs
                context = checkpoint(self._core, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                context = self._core(q, kv, turned, inputs)
        return apply_group(self.output, context, tokens)

    def _core(self, q: torch.Tensor, kv: torch.Tensor, turned: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Map q [F, H (P + R)], kv [F, H (P + V)], turned [F, R] to [F, H V]."""
        P, V = self.spec.plain, self.spec.value
        q, turned = self._rotated(q, turned, inputs)
        plain, v = kv.unflatten(-1, (self.heads, P + V)).split([P, V], -1)
        k = torch.cat([plain, turned.expand(-1, self.heads, -1)], -1)
        width = max(k.shape[-1], V)
        q, k, v = (x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        pieces = None
        if inputs.context is not None:
            k, v, pieces = inputs.context.gather(k, v, None)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if pieces is not None:
                return piece_attention(q, k, v, pieces, None, self.scores)
            return attention(q, k, v, inputs.bounds, None, inputs.packed, self.scores)

        return inputs.attend(attend, q, k, v)[..., :V].flatten(1)

    def _rotated(self, q: torch.Tensor, turned: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (q [F, H, P + R], turned [F, 1, R]) with the turned features rotated, and q at its temperature."""
        table, interleaved = inputs.tables[self.spec.position], self.spec.position.interleaved
        plain, q_turned = q.unflatten(-1, (self.heads, -1)).split([self.spec.plain, self.spec.turned], -1)
        q = torch.cat([plain, rope(q_turned, *table, interleaved)], -1)
        if self.spec.temperature is not None:
            q = q * temperatures(self.spec.temperature, inputs.position_ids, q.dtype)
        return q, rope(turned.unsqueeze(1), *table, interleaved)

    def _cached(self, q: torch.Tensor, latent: torch.Tensor, turned: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Do as `_core` over a cache of latents: latent [F, L], normed.

        Of a bias of kv_up the keys' part adds the same to all scores of a query, so that nothing comes of it.
        """
        P, V, L = self.spec.plain, self.spec.value, self.spec.latent
        q, turned = self._rotated(q, turned, inputs)
        up = self.kv_up.factors(inputs.tokens)

        def of_heads(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return rows.unflatten(0, (self.heads, P + V)).split([P, V], 1)

        k_up, v_up = of_heads(up.weight)
        plain, q_turned = q.split([P, self.spec.turned], -1)
        if up.scale is not None:
            k_scale, v_scale = of_heads(up.scale.to(q.dtype))
            plain = plain * k_scale
        query = torch.einsum("fhp,hpl->fhl", plain, k_up)
        if up.branch is not None:
            k_branch, v_branch = of_heads(up.branch)
            query = query + up.own(torch.einsum("fhp,hpr->fhr", plain, k_branch)) @ up.down
        entry = torch.cat([latent.unsqueeze(1), turned], -1)
        q = torch.cat([query, q_turned], -1)
        context = inputs.cache.attend(self.layer, q, entry, entry, None, self.scores)[..., :L]
        v = torch.einsum("fhl,hvl->fhv", context, v_up)
        if up.branch is not None:
            v = v + torch.einsum("fhr,hvr->fhv", up.own(context @ up.down.t()), v_branch)
        if up.scale is not None:
            v = v * v_scale
        return (v if up.bias is None else v + of_heads(up.bias)[1]).flatten(1)
