"""Triton kernels of attention with what torch's fused kernels lack: softcap, ALiBi, sinks, offsets by distance,
DeBERTa's positions, and dropout of probabilities that is a function of the tokens.

FlashAttention-2's passes (Dao 2023): forward keeps the logsumexp of each query, backward makes the scores again, once
for dq and once for dk and dv, and no sum depends on the order of blocks. A program goes through the tiles that are seen
whole first, without any masks, then through the others. Only megalora.ops.fused_attention imports this module, for
triton comes with torch for GPUs alone; its parts are attention_tiles, attention_scores and attention_masks.

Legend: M queries and N keys of a tile, D features of a head (WIDE: the next power of two), H query heads, GROUP of
which read one key/value head. Logarithms are to base 2. `row` and `column` count from a document's first token.
DeBERTa's positions (megalora.ops.fused_disentangled): of_queries and of_keys [H, T, PLACES] hold a token's products
with each place's row, and places [2 far + 1] the place of query - key from -far to far, beyond far as at far.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megalora.ops.attention_masks import keep, order_of, turned_keep, turned_order_of
from megalora.ops.attention_scores import LOG2E, gradient_of, line_of, outer_of, scores_of, store_pairs, with_places
from megalora.ops.attention_tiles import documents_of, drawn, keys_seen, load, of_head, queries_that_see, store, tile_at


@triton.jit(do_not_specialize=["key", "step"])
def forward_kernel(
    q, k, v, out, lse,
    bounds, key_bounds, length, total, tokens, key_tokens, sites, live_step, of_queries, of_keys, places,
    slopes, sinks, offsets, scale, softcap, window, longest, far, threshold, kept, key, step,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, CROSS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SLOPED: tl.constexpr, OFFSETS: tl.constexpr,
    SINKS: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr, PLACES: tl.constexpr,
    DROPS: tl.constexpr, LIVE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute out [T, H, D] and lse [H, T] of a tile of queries."""
    start, rows, key_start, count = documents_of(bounds, key_bounds, length, EVEN, CROSS)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * M  # with causality the last tiles take longest: they go first
    if first >= rows:
        return
    head = tl.program_id(0)
    row = first + tl.arange(0, M)
    tile = load(q, start, first, tl.arange(0, M), rows, q_token, head.to(tl.int64) * q_head, WIDE, D)
    of_key, of_value = (head // GROUP).to(tl.int64) * k_head, (head // GROUP).to(tl.int64) * v_head
    base, key_base, ahead, now = drawn(tokens, key_tokens, start, key_start, rows, count, live_step, step, DROPS, LIVE)
    slope, site = of_head(slopes, sites, head, SLOPED, DROPS)
    low, whole, whole_end, others_end = keys_seen(first, count, window, ahead, CAUSAL, WINDOWED, M, N)
    unit, shift = line_of(scale, softcap, SOFTCAP, SLOPED, OFFSETS)
    SPREAD: tl.constexpr = DROPS and not (C2P or P2C)
    local = order_of(N, SPREAD)
    if SINKS:
        most = tl.zeros((M,), tl.float32) + (tl.load(sinks + head).to(tl.float32) * LOG2E - shift) / unit
        sums = tl.zeros((M,), tl.float32) + 1.0
    else:
        most = tl.zeros((M,), tl.float32) + float("-inf")
        sums = tl.zeros((M,), tl.float32)
    result = tl.zeros((M, WIDE), tl.float32)
    nothing = kept * 0.0  # as a constant, LLVM would select among 16 bits, two instructions more for two of them
    for others in tl.static_range(2):  # first the tiles seen whole
        for i in range(low if others else whole, others_end if others else whole_end, N):
            at = tile_at(i, whole, whole_end, others)
            keys = load(k, key_start, at, local, count, k_token, of_key, WIDE, D, not others)
            s = with_places(
                tl.dot(tile, tl.trans(keys)), of_queries, of_keys, places, start, head, total, first, at, rows, count,
                far, C2P, P2C, PLACES, M, N, False,
            )  # fmt: skip
            s, _ = scores_of(
                s, row[:, None], (at + local)[None, :], count, window, slope, offsets, head * (2 * longest + 1),
                longest, scale, softcap, not others, CAUSAL, WINDOWED, SOFTCAP, SLOPED, OFFSETS,
            )  # fmt: skip
            new = tl.maximum(most, tl.max(s, 1))
            safe = tl.where(new == float("-inf"), 0.0, new) * unit
            p = tl.exp2(s * unit - safe[:, None])
            shrunk = tl.exp2(most * unit - safe)
            sums = sums * shrunk + tl.sum(p, 1)
            if DROPS:
                kept_here = keep(base + row, (key_base + at) // 8, key, site, now, threshold, M, N, SPREAD)
                p = tl.where(kept_here, p, nothing)
            values = load(v, key_start, at, local, count, v_token, of_value, WIDE, D, not others)
            result = result * shrunk[:, None] + tl.dot(p.to(values.dtype), values)
            most = new
    sums = tl.where(sums == 0.0, 1.0, sums)  # no key at all: zeros
    result = result * (kept / sums)[:, None]
    store(out, result, start, first, tl.arange(0, M), rows, out_token, head.to(tl.int64) * out_head, WIDE, D)
    here = lse + head.to(tl.int64) * total + start + row
    tl.store(here, most * unit + shift + tl.log2(sums), mask=row < rows)


@triton.jit(do_not_specialize=["key", "step"])
def query_kernel(
    q, k, v, dout, out, lse, mean, dq,
    bounds, key_bounds, length, total, tokens, key_tokens, sites, live_step, of_queries, of_keys, places,
    pairs, width, slopes, offsets, scale, softcap, window, longest, far, threshold, kept, key, step,
    q_token, q_head, k_token, k_head, v_token, v_head, dout_token, dout_head, out_token, out_head, dq_token, dq_head,
    GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, CROSS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SLOPED: tl.constexpr, OFFSETS: tl.constexpr,
    DROPS: tl.constexpr, LIVE: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr, PLACES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute mean [H, T] = the sum over features of dout out, and dq of a tile of queries: ds = p (dout v^T - mean)
    times softcap's slope, dq = scale ds k.
    """
    start, rows, key_start, count = documents_of(bounds, key_bounds, length, EVEN, CROSS)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * M
    if first >= rows:
        return
    head = tl.program_id(0)
    row = first + tl.arange(0, M)
    tile = load(q, start, first, tl.arange(0, M), rows, q_token, head.to(tl.int64) * q_head, WIDE, D)
    d = load(dout, start, first, tl.arange(0, M), rows, dout_token, head.to(tl.int64) * dout_head, WIDE, D)
    result = load(out, start, first, tl.arange(0, M), rows, out_token, head.to(tl.int64) * out_head, WIDE, D)
    means = tl.sum(d.to(tl.float32) * result.to(tl.float32), 1)
    here = head.to(tl.int64) * total + start + row
    logsum = tl.load(lse + here, mask=row < rows, other=float("inf"))
    tl.store(mean + here, means, mask=row < rows)
    of_key, of_value = (head // GROUP).to(tl.int64) * k_head, (head // GROUP).to(tl.int64) * v_head
    base, key_base, ahead, now = drawn(tokens, key_tokens, start, key_start, rows, count, live_step, step, DROPS, LIVE)
    slope, site = of_head(slopes, sites, head, SLOPED, DROPS)
    low, whole, whole_end, others_end = keys_seen(first, count, window, ahead, CAUSAL, WINDOWED, M, N)
    unit, shift = line_of(scale, softcap, SOFTCAP, SLOPED, OFFSETS)
    outer = outer_of(scale, SOFTCAP)
    SPREAD: tl.constexpr = DROPS and not (C2P or P2C)
    local = order_of(N, SPREAD)
    result = tl.zeros((M, WIDE), tl.float32)
    for others in tl.static_range(2):  # first the tiles seen whole
        for i in range(low if others else whole, others_end if others else whole_end, N):
            at = tile_at(i, whole, whole_end, others)
            keys = load(k, key_start, at, local, count, k_token, of_key, WIDE, D, not others)
            values = load(v, key_start, at, local, count, v_token, of_value, WIDE, D, not others)
            s = with_places(
                tl.dot(tile, tl.trans(keys)), of_queries, of_keys, places, start, head, total, first, at, rows, count,
                far, C2P, P2C, PLACES, M, N, False,
            )  # fmt: skip
            s, sigmoid = scores_of(
                s, row[:, None], (at + local)[None, :], count, window, slope, offsets, head * (2 * longest + 1),
                longest, scale, softcap, not others, CAUSAL, WINDOWED, SOFTCAP, SLOPED, OFFSETS,
            )  # fmt: skip
            p = tl.exp2(s * unit - (logsum - shift)[:, None])
            dp, kept_here = tl.dot(d, tl.trans(values)), 0
            if DROPS:
                kept_here = keep(base + row, (key_base + at) // 8, key, site, now, threshold, M, N, SPREAD)
            ds = gradient_of(p, dp, means[:, None], kept_here, kept, sigmoid, DROPS, SOFTCAP)
            if C2P:
                store_pairs(pairs, ds * outer, start, head, total, first, at, rows, count, width, M, N)
            result += tl.dot(ds.to(keys.dtype), keys)
    store(dq, result * outer, start, first, tl.arange(0, M), rows, dq_token, head.to(tl.int64) * dq_head, WIDE, D)


@triton.jit(do_not_specialize=["key", "step"])
def key_kernel(
    q, k, v, dout, lse, mean, dk, dv,
    bounds, key_bounds, length, total, tokens, key_tokens, sites, live_step, of_queries, of_keys, places,
    pairs, width, slopes, offsets, scale, softcap, window, longest, far, threshold, kept, key, step,
    q_token, q_head, k_token, k_head, v_token, v_head, dout_token, dout_head, dk_token, dk_head,
    GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, CROSS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SLOPED: tl.constexpr, OFFSETS: tl.constexpr,
    DROPS: tl.constexpr, LIVE: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr, PLACES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Compute dk = scale ds^T q and dv = p^T dout of a tile of keys, over the query heads that read them; or of each of
    PARTS of these heads by itself: the sums of their parts are left to the caller. DK, DV: which of the two.
    """
    start, rows, key_start, count = documents_of(bounds, key_bounds, length, EVEN, CROSS)
    base, key_base, ahead, now = drawn(tokens, key_tokens, start, key_start, rows, count, live_step, step, DROPS, LIVE)
    at = tl.program_id(2) * N - ahead
    if at >= count:
        return
    part = tl.program_id(0)
    kv_head = part // PARTS
    SPREAD: tl.constexpr = DROPS and not (C2P or P2C)
    local = turned_order_of(N, SPREAD)
    keys = load(k, key_start, at, local, count, k_token, kv_head.to(tl.int64) * k_head, WIDE, D)
    if DK:
        values = load(v, key_start, at, local, count, v_token, kv_head.to(tl.int64) * v_head, WIDE, D)
    low, whole, whole_end, others_end = queries_that_see(at, rows, window, CAUSAL, WINDOWED, M, N)
    unit, shift = line_of(scale, softcap, SOFTCAP, SLOPED, OFFSETS)
    outer = outer_of(scale, SOFTCAP)
    dks, dvs = tl.zeros((N, WIDE), tl.float32), tl.zeros((N, WIDE), tl.float32)
    nothing = kept * 0.0  # see forward_kernel
    for head in range(part * (GROUP // PARTS), (part + 1) * (GROUP // PARTS)):
        slope, site = of_head(slopes, sites, head, SLOPED, DROPS)
        of_query, of_dout = tl.cast(head, tl.int64) * q_head, tl.cast(head, tl.int64) * dout_head
        for others in tl.static_range(2):  # first the tiles that see all these keys
            for i in range(low if others else whole, others_end if others else whole_end, M):
                first = tile_at(i, whole, whole_end, others)
                row = first + tl.arange(0, M)
                tile = load(q, start, first, tl.arange(0, M), rows, q_token, of_query, WIDE, D, not others)
                d = load(dout, start, first, tl.arange(0, M), rows, dout_token, of_dout, WIDE, D, not others)
                here = tl.cast(head, tl.int64) * total + start + row
                logsum = tl.load(lse + here) if not others else tl.load(lse + here, mask=row < rows, other=float("inf"))
                s = with_places(
                    tl.dot(keys, tl.trans(tile)), of_queries, of_keys, places, start, head, total, first, at, rows,
                    count, far, C2P, P2C, PLACES, M, N, True,
                )  # fmt: skip
                s, sigmoid = scores_of(
                    s, row[None, :], (at + local)[:, None], count, window, slope, offsets, head * (2 * longest + 1),
                    longest, scale, softcap, not others, CAUSAL, WINDOWED, SOFTCAP, SLOPED, OFFSETS,
                )  # fmt: skip
                p = tl.exp2(s * unit - (logsum - shift)[None, :])
                if DK:
                    dp = tl.dot(values, tl.trans(d))
                kept_here = 0
                if DROPS:  # only here: a thread has room for few truths
                    kept_here = turned_keep(base + row, (key_base + at) // 8, key, site, now, threshold, M, N, SPREAD)
                if DK:
                    means = tl.load(mean + here) if not others else tl.load(mean + here, mask=row < rows, other=0.0)
                    ds = gradient_of(p, dp, means[None, :], kept_here, kept, sigmoid, DROPS, SOFTCAP)
                    if P2C:
                        store_pairs(pairs, ds * outer, start, head, total, at, first, count, rows, width, N, M)
                    dks += tl.dot(ds.to(tile.dtype), tile)
                if DV:
                    if DROPS:
                        p = tl.where(kept_here, p, nothing)
                    dvs += tl.dot(p.to(d.dtype), d)
    if DK:
        store(dk, dks * outer, key_start, at, local, count, dk_token, part.to(tl.int64) * dk_head, WIDE, D)
    if DV:
        store(dv, dvs * kept, key_start, at, local, count, dk_token, part.to(tl.int64) * dk_head, WIDE, D)
