"""ALiBi (Press et al. 2022) as eight more features of queries and keys, for attention kernels that know no biases.

A score gets bias = slope * key, the key's position in its document: the same for all keys of a query as
-slope * (query - key) up to what the softmax does not see. With the scale c of the scores, q gets slope / c and k gets
the position. In 16 bits neither would be exact: slope / c goes in as three terms, a position as its multiple of 256
and its rest, which bfloat16 holds up to position 65,535.

Legend: T tokens, H query and K key/value heads, D head_dim.
"""

from __future__ import annotations

import torch

EXTRA = 8  # features: kernels want head sizes in eights
_TERMS = 3
_STEP = 256


def with_bias(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, positions: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q [T, H, D + 8], k and v [T, K, D + 8] whose scores, times `scale`, have ALiBi's bias.

    slopes [H] in at least float32; positions [T] int64, in the document. The last 8 features of the result of
    attention are zero.
    """
    rest = slopes / scale
    terms = []
    for _ in range(_TERMS):
        terms.append(rest.to(q.dtype))
        rest = rest - terms[-1].to(rest.dtype)
    of_head = torch.stack([*terms, *terms, *[torch.zeros_like(terms[0])] * (EXTRA - 2 * _TERMS)], dim=-1)
    high = positions // _STEP * _STEP
    of_key = torch.stack([high] * _TERMS + [positions - high] * _TERMS + [high] * (EXTRA - 2 * _TERMS), dim=-1)
    return _widened(q, of_head.unsqueeze(0)), _widened(k, of_key.unsqueeze(1).to(k.dtype)), _padded(v)


def with_rounded_bias(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k, v as `with_bias`, where the slopes and their products with positions are rounded to bfloat16 and
    are added to q k^T before it is scaled (Falcon). K = H."""
    assert k.shape[1] == slopes.shape[0], (k.shape, slopes.shape)
    bias = slopes.to(torch.bfloat16) * positions.unsqueeze(-1)  # [T, H]
    one, zeros = torch.ones_like(bias, dtype=q.dtype), [torch.zeros_like(bias, dtype=q.dtype)] * (EXTRA - 1)
    of_key = torch.stack([bias.to(k.dtype), *zeros], dim=-1)
    return _widened(q, torch.stack([one, *zeros], dim=-1)), _widened(k, of_key), _padded(v)


def _widened(x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, features.expand(*x.shape[:2], -1)], dim=-1)


def _padded(v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(v, (0, EXTRA))
