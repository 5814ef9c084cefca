"""Attention on GPUs by kernels of our own (megalora.ops.attention_kernels), for what torch's do not compute: softcap,
ALiBi, sinks, T5's offsets and dropout of probabilities, each with windows and heads that share keys; and DeBERTa's
positions (megalora.ops.fused_disentangled). On Hopper they also train on documents of several lengths and with windows.

Legend: T tokens, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from megalora.ops.extension import has_triton
from megalora.ops.probability_dropout import ProbabilityDropout
from megalora.ops.tiled_attention import Scores

MOST_FEATURES = 256
# Programs for each that runs at a time below which the query heads that share keys go to programs of their own: with
# causality the longest takes as long as two average ones. With dropout a loop over heads costs registers.
_FEWEST_WAVES = {False: 1.8, True: 6.0}  # by whether there is dropout


@dataclass(frozen=True)
class Documents:
    """Where documents begin: bounds [N + 1] int32 on the device, none longer than `longest`; or, with bounds None,
    `count` of exactly `longest` tokens.

    key_bounds, longest_keys  of the keys, where they are those of other tokens (cross attention); else None, 0
    """

    count: int
    longest: int
    bounds: torch.Tensor | None = None
    key_bounds: torch.Tensor | None = None
    longest_keys: int = 0


@dataclass(frozen=True)
class Places:
    """What positions add to the scores of a query and a key, at the place p of query - key (see attention_kernels).

    of_queries, of_keys  [H, T, P]: what it is of each query, and of each key; None: nothing
    table  [2 L + 1] int32, the place of query - key from -L to L
    """

    of_queries: torch.Tensor | None
    of_keys: torch.Tensor | None
    table: torch.Tensor

    @property
    def count(self) -> int:
        made = self.of_keys if self.of_queries is None else self.of_queries
        return 1 if made is None else made.shape[2]


def fuses(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the kernels take it: 16-bit floats on a GPU, heads of up to 256 features."""
    return device.type == "cuda" and dtype.itemsize == 2 and head_dim <= MOST_FEATURES and has_triton()


def outruns_flash(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Return whether the kernels are faster than FlashAttention-2's, forward and backward, where both would do: on
    Hopper with heads of 65 to 128 features. Its kernels were written for the GPUs before.
    """
    features = q.shape[2]
    alike = 64 < features <= 128 and features == v.shape[2] and fuses(features, q.dtype, q.device)
    return alike and torch.cuda.get_device_capability(q.device) >= (9, 0)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the device; on a CPU Triton's interpreter runs them."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    window: int | None,
    scores: Scores,
    dropout: ProbabilityDropout | None,
) -> torch.Tensor:
    """Return the attention [T, H, D] of q [T, H, D] over k, v [T, K, D], as megalora.ops.attention.attention; or over
    k, v [S, K, D] of a document's other tokens.
    """
    return _FusedAttention.apply(q, k, v, documents, window, scores, dropout)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, documents, window, scores, dropout):
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = forward(q, k, v, documents, window, scores, dropout)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = documents, window, scores, dropout
        return out

    @staticmethod
    def backward(ctx, dout):
        return *backward(dout, *ctx.saved_tensors, *ctx.how), None, None, None, None


def forward(q, k, v, documents, window, scores, dropout, places=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (attention [T, H, D], the scores' logsumexp to base 2 [H, T] float32)."""
    from megalora.ops import attention_kernels as kernels

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    M, N, warps, stages = _tiles(q.shape[2], "forward", places is not None, _exchanges(scores, dropout))
    grid = (q.shape[1], documents.count, -(-documents.longest // M))
    where, numbers, switches = _arguments(q, k, documents, window, scores, dropout, places)
    with on(q.device):
        kernels.forward_kernel[grid](
            q, k, v, out, lse, *where, scores.slopes, scores.sinks, scores.offsets, *numbers,
            *_strides(q, k, v, out), **switches, SINKS=scores.sinks is not None, M=M, N=N,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def backward(
    dout, q, k, v, out, lse, documents, window, scores, dropout, places=None, pairs=(None, None)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dq [T, H, D], dk, dv [T, K, D]) from dout [T, H, D] and what forward had and gave.

    pairs  two [H, T, W], W at least the longest document: where the gradients of places.of_queries and places.of_keys
           go, by the key and by the query of the same document in place of the place; None where those are None
    """
    from megalora.ops import attention_kernels as kernels

    _, heads, D = q.shape
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    mean = torch.empty_like(lse)
    where, numbers, switches = _arguments(q, k, documents, window, scores, dropout, places)
    widths = [0 if one is None else one.shape[2] for one in pairs]
    sources = q, k, v, dout
    ours = [
        (*where, one, width, scores.slopes, scores.offsets, *numbers) for one, width in zip(pairs, widths, strict=True)
    ]
    with on(q.device):
        M, N, warps, stages = _tiles(D, "queries", places is not None, _exchanges(scores, dropout))
        kernels.query_kernel[heads, documents.count, -(-documents.longest // M)](
            *sources, out, lse, mean, dq, *ours[0], *_strides(*sources, out, dq), **switches,
            M=M, N=N, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        longest = (documents.longest_keys or documents.longest) + (0 if dropout is None else 7)
        found: dict[str, torch.Tensor] = {}
        for kind in _key_passes(D, places is not None):
            M, N, warps, stages = _tiles(D, kind, places is not None, _exchanges(scores, dropout))
            enough = _FEWEST_WAVES[dropout is not None] * 8 / warps
            # By the tokens, not by the bounds of documents, which are rounded up for CUDA graphs: those give the same
            # bits, and have no kernel to compile while they are captured.
            parts = _parts(heads // k.shape[1], -(-len(k) // N) * k.shape[1], enough, q.device)
            # a document's first tile may begin up to 7 keys before it
            grid = k.shape[1] * parts, documents.count, -(-longest // N)
            made = {name: _room(x, parts) for name, x in (("dk", k), ("dv", v)) if kind in ("keys", name)}
            kernels.key_kernel[grid](
                *sources, lse, mean, made.get("dk"), made.get("dv"), *ours[1],
                *_strides(*sources, *list(made.values())[:1]), **switches, PARTS=parts, DK="dk" in made,
                DV="dv" in made, M=M, N=N, num_warps=warps, num_stages=stages,
            )  # fmt: skip
            for name, x in made.items():
                found[name] = x if parts == 1 else x.unflatten(1, (-1, parts)).sum(2).to(k.dtype)
    return dq, found["dk"], found["dv"]


def _room(x: torch.Tensor, parts: int) -> torch.Tensor:
    """Return room for the gradient of x [T, K, D], or for parts of it, [T, K * parts, D] float32."""
    total, heads, D = x.shape
    return torch.empty(total, heads * parts, D, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)


def _parts(group: int, programs: int, enough: float, device: torch.device) -> int:
    """Return in how many parts go the query heads that share keys, of which `programs` take all: there are to be
    `enough` for each multiprocessor.
    """
    if group == 1:
        return 1
    enough *= _multiprocessors(device)
    return next((parts for parts in range(1, group) if group % parts == 0 and programs * parts >= enough), group)


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [step for x in tensors for step in x.stride()[:2]]


def _arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    documents: Documents,
    window: int | None,
    scores: Scores,
    dropout: ProbabilityDropout | None,
    places: Places | None,
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Return what all kernels take: (documents and dropout's tensors, numbers, constants)."""
    D, step = q.shape[2], 0
    tokens = keys = sites = live = None
    threshold, kept, key = 0, 1.0, 0
    if dropout is not None:
        draw, tokens, sites = dropout.draw, dropout.token_index, dropout.sites
        keys = tokens if dropout.key_index is None else dropout.key_index
        threshold, kept, key = draw.threshold, draw.scale, draw.key
        if isinstance(draw.step, torch.Tensor):
            live = draw.step
        else:
            step = draw.step
    where = [documents.bounds, documents.key_bounds, documents.longest, len(q), tokens, keys, sites, live]
    of_queries = of_keys = table = None
    if places is not None:
        of_queries, of_keys, table = places.of_queries, places.of_keys, places.table
    where += [of_queries, of_keys, table]
    far = 0 if table is None else table.shape[0] // 2
    scale = D**-0.5 if scores.scale is None else scores.scale
    # Where bounds are read on the device, `longest` is rounded up, and a constant may not depend on it: see `backward`.
    windowed = window is not None and (documents.bounds is not None or window < documents.longest)
    longest = 0 if scores.offsets is None else scores.offsets.shape[1] // 2
    numbers = [scale, scores.softcap or 0.0, window or 0, longest, far, threshold, kept, key, step]
    switches = {
        "GROUP": q.shape[1] // k.shape[1], "D": D, "WIDE": max(16, 1 << (D - 1).bit_length()),
        "EVEN": documents.bounds is None, "CROSS": documents.key_bounds is not None, "CAUSAL": scores.causal,
        "WINDOWED": windowed, "SOFTCAP": scores.softcap is not None,
        "SLOPED": scores.slopes is not None,
        "OFFSETS": scores.offsets is not None, "DROPS": dropout is not None, "LIVE": live is not None,
        "C2P": of_queries is not None, "P2C": of_keys is not None, "PLACES": 1 if places is None else places.count,
    }  # fmt: skip
    return where, numbers, switches


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _large_shared_memory() -> bool:
    device: Any = torch.cuda.get_device_properties(torch.cuda.current_device())  # its types lack what it has
    return device.shared_memory_per_block_optin >= 200_000


def _key_passes(D: int, places: bool) -> tuple[str, ...]:
    """Return the kernels of dk and dv: one; or, where both sums leave no registers for tiles of some size, one each."""
    return ("dk", "dv") if D > 128 and not places and _large_shared_memory() else ("keys",)


def _exchanges(scores: Scores, dropout: ProbabilityDropout | None) -> bool:
    """Return whether threads hand more to each other than tiles, which takes shared memory."""
    return dropout is not None or scores.offsets is not None


@functools.cache
def _tiles(D: int, kernel: str, places: bool, exchanges: bool) -> tuple[int, int, int, int]:
    """Return (queries and keys of a tile, warps, stages of the loop's loads): what fits the registers and the shared
    memory of Hopper, or for large heads of less.
    """
    if places:  # what is read for each pair takes registers and waits: small tiles, several a multiprocessor
        warps, stages = 4 if D <= 64 else 8, 2 if D <= 128 else 1
        return (32, 64, warps, stages) if kernel == "keys" else (64, 32, warps, stages)
    if D > 128:
        if not _large_shared_memory():
            return {"forward": (64, 64, 8, 1), "queries": (64, 32, 8, 1), "keys": (32, 64, 8, 1)}[kernel]
        stages = 2 if exchanges else 3
        return {
            "forward": (128, 64, 8, 2), "queries": (128, 32, 8, 2), "dk": (32, 128, 8, stages), "dv": (32, 64, 4, 2)
        }[kernel]  # fmt: skip
    if D > 64:
        return {"forward": (64, 64, 4, 3), "queries": (64, 64, 4, 2), "keys": (32, 64, 4, 2)}[kernel]
    return {"forward": (128, 64, 8, 3), "queries": (128, 64, 8, 3), "keys": (64, 128, 8, 2)}[kernel]
