"""Attention of one new token of each of several sequences over a cache of their keys and values (generation).

A sequence reads what it has, whatever the others have: nothing is padded to the longest.

Legend: B sequences, H query and K key/value heads, D head_dim, S slots of the cache, C tokens that one holds.
"""

from __future__ import annotations

import torch

from megalora.ops import extension, limits
from megalora.ops.tiled_attention import PLAIN, Scores

MOST_TILED_FEATURES, MOST_TILED_QUERIES = 256, 16  # of a head, and of queries that read it, in Triton's kernels


def decode_attention(
    q_BHD: torch.Tensor,
    k_BKD: torch.Tensor,
    v_BKD: torch.Tensor,
    keys_SKCD: torch.Tensor,
    values_SKCD: torch.Tensor,
    slots_B: torch.Tensor,
    positions_B: torch.Tensor,
    window: int | None = None,
    scores: Scores = PLAIN,
    chunk: int | None = None,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    arrived: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep k and v in the cache and return the attention of q [B, H, D] over the tokens up to them.

    Sequence b lies in slot slots[b], and its new token takes place positions[b] there; both [B] int64, no slot twice.
    K divides H: query head h reads head h * K // H. window: a token sees itself and the window - 1 tokens before it;
    None: all before it. scores: as `attention` takes them, causal. chunk: a token sees none before the last multiple of
    it; in plain torch. angles: cos and sin [B, D / 2] by which q and k are rotated first, as `rope` does, where the
    kernel `turns`. arrived: at least B K zeros, int32, which the kernel of a GPU counts in and leaves as zeros; None:
    new ones.
    """
    assert scores.causal
    if chunk is None and scores.simple and _compiled(q_BHD, k_BKD, v_BKD):
        if scores.scale is not None:  # the kernel has its own
            q_BHD = q_BHD * (scores.scale * q_BHD.shape[2] ** 0.5)
        out = torch.empty(q_BHD.shape, dtype=q_BHD.dtype, device=q_BHD.device)
        if arrived is None and q_BHD.is_cuda:
            arrived = torch.zeros(k_BKD.shape[:2], dtype=torch.int32, device=q_BHD.device)
        where = slots_B, positions_B, window or 0, out
        turned = (None, None) if angles is None else angles
        torch.ops.megalora.decode_attention_(q_BHD, k_BKD, v_BKD, keys_SKCD, values_SKCD, *where, *turned, arrived)
        return out
    assert angles is None
    if chunk is None and scores.simple and _tiled(q_BHD, k_BKD, v_BKD):
        from megalora.ops.decode_attention_kernels import tiled_decode_attention

        scale = q_BHD.shape[2] ** -0.5 if scores.scale is None else scores.scale
        return tiled_decode_attention(q_BHD, k_BKD, v_BKD, keys_SKCD, values_SKCD, slots_B, positions_B, window, scale)
    keys_SKCD[slots_B, :, positions_B] = k_BKD
    values_SKCD[slots_B, :, positions_B] = v_BKD
    longest = int(positions_B.max()) + 1
    keys, values = (x[slots_B, :, :longest] for x in (keys_SKCD, values_SKCD))
    return kept_attention(q_BHD, keys, values, positions_B, window, scores, chunk)


def kept_attention(
    q_BHD: torch.Tensor,
    keys_BKnD: torch.Tensor,
    values_BKnD: torch.Tensor,
    positions_B: torch.Tensor,
    window: int | None = None,
    scores: Scores = PLAIN,
    chunk: int | None = None,
) -> torch.Tensor:
    """Return the attention of q [B, H, D] over the first n tokens of each sequence, those beyond its own hidden.

    In plain torch; positions, window, scores and chunk as `decode_attention` takes them.
    """
    behind = positions_B[:, None] - torch.arange(keys_BKnD.shape[2], device=q_BHD.device)
    seen = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    if chunk is not None:
        seen = seen & (behind <= positions_B[:, None] % chunk)
    seen = seen[:, None, :]
    # A mask does not hide what is not finite, and nobody has written there yet.
    keys, values = (x.masked_fill(~seen.unsqueeze(-1), 0) for x in (keys_BKnD, values_BKnD))
    if not scores.simple:
        return _capped(q_BHD, keys, values, seen, behind, scores)
    gqa = q_BHD.shape[1] != keys.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        q_BHD.unsqueeze(2), keys, values, attn_mask=seen.unsqueeze(2), enable_gqa=gqa, scale=scores.scale
    )
    return out.squeeze(2)


def _capped(q_BHD, keys, values, seen, behind, scores: Scores) -> torch.Tensor:
    """Map keys, values [B, K, n, D], seen [B, 1, n], behind [B, n] to [B, H, D], with softcap, biases and sinks."""
    wide, group = torch.promote_types(q_BHD.dtype, torch.float32), q_BHD.shape[1] // keys.shape[1]
    q = q_BHD.unflatten(1, (-1, group)).to(wide)
    s = q @ keys.to(wide).transpose(2, 3) * (q.shape[3] ** -0.5 if scores.scale is None else scores.scale)
    if scores.softcap is not None:
        s = torch.tanh(s / scores.softcap) * scores.softcap
    if scores.slopes is not None:
        s = s - scores.slopes.view(1, -1, group, 1) * behind[:, None, None].abs()
    if scores.offsets is not None:
        s = s + scores.bias(behind).transpose(0, 1).unflatten(1, (-1, group))
    s = s.masked_fill(~seen.unsqueeze(2), float("-inf"))
    if scores.sinks is None:
        weights = s.softmax(-1).to(q_BHD.dtype)
    else:
        sinks = scores.sinks.view(1, -1, group, 1).expand(len(s), -1, -1, -1).to(wide)
        weights = torch.cat([s, sinks], -1).softmax(-1)[..., :-1].to(q_BHD.dtype)
    return (weights @ values).flatten(1, 2)


def has_kernel(device_type: str, dtype: torch.dtype, group: int, head_dim: int) -> bool:
    """Return whether kernels take `group` = H / K query heads a key/value head; the reference waits for the host."""
    return _is_compiled(device_type, dtype, group, head_dim) or _is_tiled(device_type, dtype, group, head_dim)


def _is_compiled(device_type: str, dtype: torch.dtype, group: int, head_dim: int) -> bool:
    if device_type == "cuda" and not (
        dtype in (torch.bfloat16, torch.float16)
        and head_dim in (limits.SMALL_HEAD_DIM, limits.LARGE_HEAD_DIM)
        and group <= limits.MOST_QUERIES_PER_HEAD
    ):
        return False
    return extension.has_kernels(device_type)


def _is_tiled(device_type: str, dtype: torch.dtype, group: int, head_dim: int) -> bool:
    """Return whether Triton's kernels take it: heads that the compiled ones are not made for."""
    halves = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return halves and head_dim <= MOST_TILED_FEATURES and group <= MOST_TILED_QUERIES and extension.has_triton()


def turns(x: torch.Tensor, group: int, head_dim: int) -> bool:
    """Return whether the kernel rotates q and k of heads like x itself: on a GPU."""
    return x.is_cuda and _is_compiled("cuda", x.dtype, group, head_dim)


def _compiled(q_BHD: torch.Tensor, k_BKD: torch.Tensor, v_BKD: torch.Tensor) -> bool:
    return _adjacent(q_BHD, k_BKD, v_BKD) and _is_compiled(*_kind(q_BHD, k_BKD))


def _tiled(q_BHD: torch.Tensor, k_BKD: torch.Tensor, v_BKD: torch.Tensor) -> bool:
    return _adjacent(q_BHD, k_BKD, v_BKD) and _is_tiled(*_kind(q_BHD, k_BKD))


def _adjacent(*tensors: torch.Tensor) -> bool:
    return all(x.stride(2) == 1 for x in tensors)


def _kind(q_BHD: torch.Tensor, k_BKD: torch.Tensor) -> tuple[str, torch.dtype, int, int]:
    """Return what `has_kernel` takes."""
    return q_BHD.device.type, q_BHD.dtype, q_BHD.shape[1] // k_BKD.shape[1], q_BHD.shape[2]
