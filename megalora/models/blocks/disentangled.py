"""DeBERTa's positions: a frozen table that the layers of a stack share, and what a layer makes of its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn

from megalora.models import spec
from megalora.models.blocks.ends import Frozen
from megalora.models.blocks.norm import NORMS
from megalora.models.blocks.place import LayerPlace
from megalora.models.inputs import Inputs
from megalora.models.names import hang
from megalora.ops.disentangled_attention import Positions
from megalora.ops.dropout import drop
from megalora.ops.fused_disentangled import starts_of
from megalora.parallel.group import LinearGroup
from megalora.parallel.group_grad import apply_group
from megalora.parallel.placement import Tokens
from megalora.parallel.split import Part

M = TypeVar("M", bound=nn.Module)

# Rows of the table have numbers behind those of all tokens, so that no dropout mask is drawn twice.
_FIRST_ROW = 1 << 40


class DisentangledPositions:
    """What a layer adds to its scores for positions.

    heads  of this rank; tokens: the group of the tokens' q, k and v, which reads the table too where these are shared
    """

    def __init__(self, attention: spec.Attention, heads: Part, tokens: LinearGroup, at: LayerPlace):
        position, place = attention.position, at.place
        assert isinstance(position, spec.Disentangled)
        rows, norm = 2 * position.span, position.norm
        self.spec, self._place, self._heads, self._dim = position, place, heads.size, attention.head_dim
        self._table = _once(at.root, position.name, lambda: Frozen((rows, position.size), None, place))
        self._norm = None if norm is None else _once(at.root, norm.name, lambda: NORMS[norm.kind](norm, place))
        self._group = tokens
        if not position.shared:
            linears = tuple(at.column(linear, heads.times(self._dim)) for linear in position.linears)
            self._group = LinearGroup(linears, at.site("positions"), place)
        self._site = at.site("positions table")
        # Under sequence parallelism each rank has its share of the rows, of which there is then one for all.
        padded = -(-rows // place.tp.size) * place.tp.size if place.gathers else rows
        self._padding, self._rows = padded - rows, rows
        self._places = places_of(position, str(place.device))
        self._index = torch.arange(_FIRST_ROW, _FIRST_ROW + padded, device=place.device)

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Its own linears: none where it shares the tokens'."""
        return () if self.spec.shared else (self._group,)

    def __call__(self, inputs: Inputs) -> Positions:
        """Return K and Q of the table's rows, and which row each distance has."""
        tokens = Tokens(self._index, self._place.own_tokens(self._index), inputs.tokens.seed, inputs.tokens.step)
        table = self._table.weight if self._norm is None else self._norm(self._table.weight)
        table = nn.functional.pad(table, (0, 0, 0, self._padding)) if self._padding else table
        table = drop(self._place.own_tokens(table), tokens.local, tokens.draw(self.spec.dropout, self._site))
        made = apply_group(self._group, table.contiguous(), tokens)[: self._rows].unflatten(-1, (-1, self._dim))
        parts = list(made.split(self._heads, dim=1))
        if self.spec.shared:
            query, key = parts[0], parts[1]
            keys, queries = (None if self.spec.key is None else key), (None if self.spec.query is None else query)
        else:
            keys = None if self.spec.key is None else parts.pop(0)
            queries = None if self.spec.query is None else parts.pop(0)
        return Positions(keys, queries, *self._places)


@functools.lru_cache(maxsize=8)
def places_of(position: spec.Disentangled, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and starts of Positions, as far as rows differ: the same for all layers and all documents."""
    longest, last = position.span, 2 * position.span - 1
    rows = rows_of(position, longest)
    while rows[0] != 0 or rows[-1] != last:
        longest *= 2
        rows = rows_of(position, longest)
    return rows.int().to(device), starts_of(rows, last + 1).to(device)


def rows_of(position: spec.Disentangled, longest: int) -> torch.Tensor:
    """Return the rows [2 longest + 1] int64 of query - key from -longest to longest.

    The logarithm of far distances is taken in float32, as transformers does: another precision may move a border.
    """
    distance, span = torch.arange(-longest, longest + 1), position.span
    if position.furthest is not None:
        middle = span // 2
        near = (distance > -middle) & (distance < middle)
        size = torch.where(near, middle - 1, distance.abs())
        whole = torch.log(torch.tensor((position.furthest - 1) / middle))
        far = torch.ceil(torch.log(size / middle) / whole * (middle - 1)) + middle
        distance = torch.where(size <= middle, distance, far * distance.sign()).long()
    return (distance + span).clamp(0, 2 * span - 1)


def _once(root: nn.Module, name: str, build: Callable[[], M]) -> M:
    """Return the module that a layer before has registered below `root`; else build and register it."""
    try:
        return cast(M, root.get_submodule(name))
    except AttributeError:
        module = build()
        hang(root, name, module)
        return module
