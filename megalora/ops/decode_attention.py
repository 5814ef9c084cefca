"""Attention of one new token of each of several sequences over a cache of their keys and values (generation).

A sequence reads what it has, whatever the others have: nothing is padded to the longest.

Legend: B sequences, H query and K key/value heads, D head_dim, S slots of the cache, C tokens that one holds.
"""

from __future__ import annotations

import torch

from megalora.ops import extension, limits


def decode_attention(
    q_BHD: torch.Tensor,
    k_BKD: torch.Tensor,
    v_BKD: torch.Tensor,
    keys_SKCD: torch.Tensor,
    values_SKCD: torch.Tensor,
    slots_B: torch.Tensor,
    positions_B: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """Keeps k and v in the cache and gives the attention of q [B, H, D] over the tokens up to them; scale 1 / sqrt(D).

    Sequence b lies in slot slots[b], and its new token takes place positions[b] there; both [B] int64, no slot twice.
    K divides H: query head h reads head h * K // H. window: a token sees itself and the window - 1 tokens before it;
    None: all before it.
    """
    if _compiled(q_BHD, k_BKD, v_BKD):
        out = torch.empty(q_BHD.shape, dtype=q_BHD.dtype, device=q_BHD.device)
        torch.ops.megalora.decode_attention_(
            q_BHD, k_BKD, v_BKD, keys_SKCD, values_SKCD, slots_B, positions_B, window or 0, out
        )
        return out
    keys_SKCD[slots_B, :, positions_B] = k_BKD
    values_SKCD[slots_B, :, positions_B] = v_BKD
    longest = int(positions_B.max()) + 1
    behind = positions_B[:, None] - torch.arange(longest, device=q_BHD.device)
    seen = ((behind >= 0) if window is None else (behind >= 0) & (behind < window))[:, None, :]
    # A mask does not hide what is not finite, and nobody has written there yet.
    keys, values = (x[slots_B, :, :longest].masked_fill(~seen.unsqueeze(-1), 0) for x in (keys_SKCD, values_SKCD))
    gqa = q_BHD.shape[1] != k_BKD.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        q_BHD.unsqueeze(2), keys, values, attn_mask=seen.unsqueeze(2), enable_gqa=gqa
    )
    return out.squeeze(2)


def has_kernel(device_type: str, dtype: torch.dtype, group: int, head_dim: int) -> bool:
    """Whether it is compiled for `group` = H / K query heads a key/value head; the reference waits for the host."""
    if device_type == "cuda" and not (
        dtype in (torch.bfloat16, torch.float16)
        and head_dim in (limits.SMALL_HEAD_DIM, limits.LARGE_HEAD_DIM)
        and group <= limits.MOST_QUERIES_PER_HEAD
    ):
        return False
    return extension.has_kernels(device_type)


def _compiled(q_BHD: torch.Tensor, k_BKD: torch.Tensor, v_BKD: torch.Tensor) -> bool:
    group = q_BHD.shape[1] // k_BKD.shape[1]
    adjacent = q_BHD.stride(2) == k_BKD.stride(2) == v_BKD.stride(2) == 1
    return adjacent and has_kernel(q_BHD.device.type, q_BHD.dtype, group, q_BHD.shape[2])
