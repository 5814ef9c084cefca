"""Triton kernels of attention with what torch's fused kernels lack: softcap, ALiBi, sinks, offsets by distance,
DeBERTa's positions, and dropout of probabilities that is a function of the tokens.

FlashAttention-2's passes (Dao 2023): forward keeps the logsumexp of each query, backward makes the scores again, once
for dq and once for dk and dv, and no sum depends on the order of blocks. Only megalora.ops.fused_attention and
megalora.ops.place_kernels import this module, for triton comes with torch for GPUs alone.

Legend: M queries and N keys of a tile, D features of a head (WIDE: the next power of two), H query heads, GROUP of
which read one key/value head. Logarithms are to base 2. `row` and `column` count from a document's first token.
DeBERTa's positions (megalora.ops.fused_disentangled): of_queries and of_keys [H, T, PLACES] hold a token's products
with each place's row, and places [2 far + 1] the place of query - key from -far to far, beyond far as at far.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def document_of(bounds, length, EVEN: tl.constexpr):
    """Return (first token, tokens) of this program's document."""
    document = tl.program_id(1)
    if EVEN:
        start = document.to(tl.int64) * length
        count = length
    else:
        start = tl.load(bounds + document).to(tl.int64)
        count = (tl.load(bounds + document + 1).to(tl.int64) - start).to(tl.int32)
    return start, count


@triton.jit
def _first_number(tokens, start, count):
    """Return the number of a document's first token; 0 where it has none."""
    return tl.load(tokens + start, mask=count > 0, other=0)


@triton.jit
def _documents(bounds, key_bounds, length, EVEN: tl.constexpr, CROSS: tl.constexpr):
    """Return first token and tokens of this program's document, then those of its keys."""
    start, rows = document_of(bounds, length, EVEN)
    key_start, count = start, rows
    if CROSS:
        key_start, count = document_of(key_bounds, length, False)
    return start, rows, key_start, count


@triton.jit
def _drawn(
    tokens, key_tokens, start, key_start, rows, count, live_step, step, DROPS: tl.constexpr, LIVE: tl.constexpr
):  # fmt: skip
    """Return what masks are drawn from: the numbers of the first query and key, by how much tiles of keys begin before
    that, and the step.
    """
    shift, base, key_base, now = 0, start, start, step
    if DROPS:
        base, key_base = _first_number(tokens, start, rows), _first_number(key_tokens, key_start, count)
        shift = (key_base % 8).to(tl.int32)
        if LIVE:
            now = tl.load(live_step)
    return base, key_base, shift, now


@triton.jit
def _keep(query, block, key, site, step, threshold, M: tl.constexpr, N: tl.constexpr):
    """Return which probabilities [M, N] are kept (megalora.ops.probability_dropout): query [M] int64, the numbers of
    the tokens; block int64, that of the first eight keys.
    """
    zero = tl.zeros((M, N // 8), tl.uint32)
    low = zero + (query & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = zero + (query >> 32).to(tl.uint32)[:, None]
    blocks = zero + (block + tl.arange(0, N // 8)).to(tl.uint32)[None, :]
    a, b, c, d = philox_impl(
        low, blocks, zero + tl.cast(step, tl.uint32), high, zero + tl.cast(key, tl.uint32), zero + site, 10
    )
    # Eight lanes of 16 bits: the low half of a word, its high half, the next word.
    first = tl.join(_halves(a, threshold), _halves(b, threshold))  # [M, N / 8, half, word]
    second = tl.join(_halves(c, threshold), _halves(d, threshold))
    return tl.reshape(tl.permute(tl.join(first, second), (0, 1, 4, 3, 2)), (M, N)) != 0


@triton.jit
def _halves(word, threshold):
    """Return [..., 2] int8: whether the low half of a word is kept, and its high half."""
    return tl.join(((word & 0xFFFF) >= threshold).to(tl.int8), ((word >> 16) >= threshold).to(tl.int8))


@triton.jit
def _scores(
    s, row, column, first, at, rows, count, window, slope, offsets, of_head, longest, scale, softcap,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SLOPED: tl.constexpr, OFFSETS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return (the scores times log2(e), not seen: -inf; the tanh of softcap, or s) of products s; row and column, from
    `first` and `at` on, are broadcast against it, of `rows` queries and `count` keys.
    """
    tanh = s
    if not (SOFTCAP or SLOPED or OFFSETS):
        s = s * (scale * LOG2E)
    else:
        s = s * scale
    if SOFTCAP:
        tanh = 2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0
        s = softcap * tanh
    if SLOPED:
        s = s - slope * tl.abs(row - column).to(tl.float32)
    if OFFSETS:
        place = tl.minimum(tl.maximum(column - row, -longest), longest) + longest
        s = s + tl.load(offsets + of_head + place)
    if SOFTCAP or SLOPED or OFFSETS:
        s = s * LOG2E
    # Most tiles are seen whole: comparing each of their elements costs as much as the exponentials.
    whole = (at >= 0) & (at + N <= count) & (first + M <= rows)
    if CAUSAL:
        whole = whole & (at + N <= first + 1)
    if WINDOWED:
        whole = whole & (first + M - at <= window) & (at + N - first <= window)
    if not whole:
        seen = (column >= 0) & (column < count) & (row < rows)
        if CAUSAL:
            seen = seen & (column <= row)
        if WINDOWED:
            seen = seen & (row - column < window) & (column - row < window)
        s = tl.where(seen, s, float("-inf"))
    return s, tanh


@triton.jit
def _with_places(
    s, of_queries, of_keys, places, start, head, total, first, at, rows, count, far,
    C2P: tl.constexpr, P2C: tl.constexpr, PLACES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Return s [M, N], or TURNED [N, M], and what positions add to the scores of queries from `first` on and keys from
    `at` on: of_queries[query, place] and of_keys[key, place].

    Each is read with the tokens on the other side of a pair side by side, whose places are neighbours in memory.
    """
    if C2P:
        behind = first - at + tl.arange(0, M)[:, None] - tl.arange(0, N)[None, :]
        found = _of_places(of_queries, places, start, head, total, first, rows, behind, far, PLACES, M)
        s += tl.trans(found) if TURNED else found
    if P2C:
        behind = first - at + tl.arange(0, M)[None, :] - tl.arange(0, N)[:, None]
        found = _of_places(of_keys, places, start, head, total, at, count, behind, far, PLACES, N)
        s += found if TURNED else tl.trans(found)
    return s


@triton.jit
def _of_places(
    table, places, start, head, total, first, count, behind, far, PLACES: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Return table[head, token, place of `behind`] of ROWS tokens of a document from `first` on; behind [ROWS, ...]."""
    local = tl.arange(0, ROWS)[:, None]
    place = tl.load(places + (tl.minimum(tl.maximum(behind, -far), far) + far))
    here = table + (tl.cast(head, tl.int64) * total + start + first) * PLACES
    return tl.load(here + (local * PLACES + place), mask=(local + first >= 0) & (local + first < count), other=0.0)


@triton.jit
def _store_pairs(pairs, value, start, head, total, first, at, rows, count, width, M: tl.constexpr, N: tl.constexpr):
    """Store value [M, N] of tokens from `first` on and others from `at` on in pairs [H, T, width]."""
    local, other = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    inside = (local + first >= 0) & (local + first < rows) & (other + at >= 0) & (other + at < count)
    here = pairs + ((tl.cast(head, tl.int64) * total + start + first) * width + at)
    tl.store(here + (local * width + other), value.to(pairs.dtype.element_ty), mask=inside)


@triton.jit
def _keys_seen(
    first, count, window, shift, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Return the range of keys that a tile of queries from row `first` on sees, from the start of a tile of keys on.

    Tiles of keys begin with a block of eight numbers, `shift` keys before a multiple of N.
    """
    low, high = 0, count
    if CAUSAL:
        high = tl.minimum(count, first + M)
    if WINDOWED:
        low = tl.maximum(0, first - window + 1)
        high = tl.minimum(high, first + M + window - 1)
    return (low + shift) // N * N - shift, high


@triton.jit
def _place(x, start, at, count, stride, head, ROWS: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr):
    """Return (pointers, mask) of ROWS rows of a document from row `at` on, [ROWS, WIDE]."""
    local, features = tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = ((at + local >= 0) & (at + local < count))[:, None] & (features < D)[None, :]
    first = x + (start + at) * stride + head  # what differs between elements is small: 32 bits of registers
    return first + (local[:, None] * stride + features[None, :]), inside


@triton.jit
def _load(x, start, at, count, stride, head, ROWS: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr):
    """Return rows of a document as [ROWS, WIDE], zeros outside."""
    place, inside = _place(x, start, at, count, stride, head, ROWS, WIDE, D)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def _store(x, value, start, at, count, stride, head, ROWS: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr):
    place, inside = _place(x, start, at, count, stride, head, ROWS, WIDE, D)
    tl.store(place, value.to(x.dtype.element_ty), mask=inside)


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
    start, rows, key_start, count = _documents(bounds, key_bounds, length, EVEN, CROSS)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # with causality the last tiles take longest
    if first >= rows:
        return
    head = tl.program_id(2)
    row = first + tl.arange(0, M)
    tile = _load(q, start, first, rows, q_token, head.to(tl.int64) * q_head, M, WIDE, D)
    of_key, of_value = (head // GROUP).to(tl.int64) * k_head, (head // GROUP).to(tl.int64) * v_head
    base, key_base, shift, now = _drawn(tokens, key_tokens, start, key_start, rows, count, live_step, step, DROPS, LIVE)
    slope, site = 0.0, 0
    if SLOPED:
        slope = tl.load(slopes + head)
    if DROPS:
        site = tl.load(sites + head).to(tl.uint32)
    low, high = _keys_seen(first, count, window, shift, CAUSAL, WINDOWED, M, N)
    if SINKS:
        most = tl.zeros((M,), tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        sums = tl.zeros((M,), tl.float32) + 1.0
    else:
        most = tl.zeros((M,), tl.float32) + float("-inf")
        sums = tl.zeros((M,), tl.float32)
    result = tl.zeros((M, WIDE), tl.float32)
    for at in range(low, high, N):
        column = at + tl.arange(0, N)
        keys = _load(k, key_start, at, count, k_token, of_key, N, WIDE, D)
        s = _with_places(
            tl.dot(tile, tl.trans(keys)), of_queries, of_keys, places, start, head, total, first, at, rows, count, far,
            C2P, P2C, PLACES, M, N, False,
        )  # fmt: skip
        s, _ = _scores(
            s, row[:, None], column[None, :], first, at, rows, count, window, slope,
            offsets, head * (2 * longest + 1), longest, scale, softcap,
            CAUSAL, WINDOWED, SOFTCAP, SLOPED, OFFSETS, M, N,
        )  # fmt: skip
        new = tl.maximum(most, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[:, None])
        shrunk = tl.exp2(most - safe)
        sums = sums * shrunk + tl.sum(p, 1)
        if DROPS:
            kept_here = _keep(base + row, (key_base + at) // 8, key, site, now, threshold, M, N)
            p = tl.where(kept_here, p * kept, 0.0)
        values = _load(v, key_start, at, count, v_token, of_value, N, WIDE, D)
        result = result * shrunk[:, None] + tl.dot(p.to(values.dtype), values)
        most = new
    sums = tl.where(sums == 0.0, 1.0, sums)  # no key at all: zeros
    _store(out, result / sums[:, None], start, first, rows, out_token, head.to(tl.int64) * out_head, M, WIDE, D)
    tl.store(lse + head.to(tl.int64) * total + start + row, most + tl.log2(sums), mask=row < rows)


@triton.jit
def mean_kernel(
    dout, out, mean, total, dout_token, dout_head, out_token, out_head,
    D: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Compute mean [H, T] = the sum over features of dout out."""
    at, head = tl.program_id(0) * M, tl.program_id(1).to(tl.int64)
    row, start = at + tl.arange(0, M), head * 0
    d = _load(dout, start, at, total, dout_token, head * dout_head, M, WIDE, D).to(tl.float32)
    o = _load(out, start, at, total, out_token, head * out_head, M, WIDE, D).to(tl.float32)
    tl.store(mean + head * total + row, tl.sum(d * o, 1), mask=row < total)


@triton.jit(do_not_specialize=["key", "step"])
def query_kernel(
    q, k, v, dout, lse, mean, dq,
    bounds, key_bounds, length, total, tokens, key_tokens, sites, live_step, of_queries, of_keys, places,
    pairs, width, slopes, offsets, scale, softcap, window, longest, far, threshold, kept, key, step,
    q_token, q_head, k_token, k_head, v_token, v_head, dout_token, dout_head, dq_token, dq_head,
    GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, CROSS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SLOPED: tl.constexpr, OFFSETS: tl.constexpr,
    DROPS: tl.constexpr, LIVE: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr, PLACES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute dq of a tile of queries: ds = p (dout v^T - mean) times softcap's slope, dq = scale ds k."""
    start, rows, key_start, count = _documents(bounds, key_bounds, length, EVEN, CROSS)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    if first >= rows:
        return
    head = tl.program_id(2)
    row = first + tl.arange(0, M)
    tile = _load(q, start, first, rows, q_token, head.to(tl.int64) * q_head, M, WIDE, D)
    d = _load(dout, start, first, rows, dout_token, head.to(tl.int64) * dout_head, M, WIDE, D)
    here = head.to(tl.int64) * total + start + row
    logsum = tl.load(lse + here, mask=row < rows, other=float("inf"))
    means = tl.load(mean + here, mask=row < rows, other=0.0)
    of_key, of_value = (head // GROUP).to(tl.int64) * k_head, (head // GROUP).to(tl.int64) * v_head
    base, key_base, shift, now = _drawn(tokens, key_tokens, start, key_start, rows, count, live_step, step, DROPS, LIVE)
    slope, site = 0.0, 0
    if SLOPED:
        slope = tl.load(slopes + head)
    if DROPS:
        site = tl.load(sites + head).to(tl.uint32)
    low, high = _keys_seen(first, count, window, shift, CAUSAL, WINDOWED, M, N)
    result = tl.zeros((M, WIDE), tl.float32)
    for at in range(low, high, N):
        column = at + tl.arange(0, N)
        keys = _load(k, key_start, at, count, k_token, of_key, N, WIDE, D)
        values = _load(v, key_start, at, count, v_token, of_value, N, WIDE, D)
        s = _with_places(
            tl.dot(tile, tl.trans(keys)), of_queries, of_keys, places, start, head, total, first, at, rows, count, far,
            C2P, P2C, PLACES, M, N, False,
        )  # fmt: skip
        s, tanh = _scores(
            s, row[:, None], column[None, :], first, at, rows, count, window, slope,
            offsets, head * (2 * longest + 1), longest, scale, softcap,
            CAUSAL, WINDOWED, SOFTCAP, SLOPED, OFFSETS, M, N,
        )  # fmt: skip
        p = tl.exp2(s - logsum[:, None])
        ds = tl.dot(d, tl.trans(values))
        if DROPS:
            kept_here = _keep(base + row, (key_base + at) // 8, key, site, now, threshold, M, N)
            ds = tl.where(kept_here, ds * kept, 0.0)
        ds = p * (ds - means[:, None])
        if SOFTCAP:
            ds = ds * (1.0 - tanh * tanh)
        if C2P:
            _store_pairs(pairs, ds * scale, start, head, total, first, at, rows, count, width, M, N)
        result += tl.dot(ds.to(keys.dtype), keys)
    _store(dq, result * scale, start, first, rows, dq_token, head.to(tl.int64) * dq_head, M, WIDE, D)


@triton.jit(do_not_specialize=["key", "step"])
def key_kernel(
    q, k, v, dout, lse, mean, dk, dv,
    bounds, key_bounds, length, total, tokens, key_tokens, sites, live_step, of_queries, of_keys, places,
    pairs, width, slopes, offsets, scale, softcap, window, longest, far, threshold, kept, key, step,
    q_token, q_head, k_token, k_head, v_token, v_head, dout_token, dout_head, dk_token, dk_head,
    GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, CROSS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SLOPED: tl.constexpr, OFFSETS: tl.constexpr,
    DROPS: tl.constexpr, LIVE: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr, PLACES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Compute dk = scale ds^T q and dv = p^T dout of a tile of keys, over the query heads that read them; or of each of
    PARTS of these heads by itself: the sums of their parts are left to the caller.
    """
    start, rows, key_start, count = _documents(bounds, key_bounds, length, EVEN, CROSS)
    base, key_base, shift, now = _drawn(tokens, key_tokens, start, key_start, rows, count, live_step, step, DROPS, LIVE)
    at = tl.program_id(0) * N - shift
    if at >= count:
        return
    part = tl.program_id(2)
    kv_head = part // PARTS
    column = at + tl.arange(0, N)
    keys = _load(k, key_start, at, count, k_token, kv_head.to(tl.int64) * k_head, N, WIDE, D)
    values = _load(v, key_start, at, count, v_token, kv_head.to(tl.int64) * v_head, N, WIDE, D)
    low, high = 0, rows
    if CAUSAL:
        low = tl.maximum(at, 0)
    if WINDOWED:
        low, high = tl.maximum(low, at - window + 1), tl.minimum(rows, at + N + window - 1)
    low = low // M * M
    dks, dvs = tl.zeros((N, WIDE), tl.float32), tl.zeros((N, WIDE), tl.float32)
    for head in range(part * (GROUP // PARTS), (part + 1) * (GROUP // PARTS)):
        slope, site = 0.0, 0
        if SLOPED:
            slope = tl.load(slopes + head)
        if DROPS:
            site = tl.load(sites + head).to(tl.uint32)
        of_query, of_dout = tl.cast(head, tl.int64) * q_head, tl.cast(head, tl.int64) * dout_head
        for first in range(low, high, M):
            row = first + tl.arange(0, M)
            tile = _load(q, start, first, rows, q_token, of_query, M, WIDE, D)
            d = _load(dout, start, first, rows, dout_token, of_dout, M, WIDE, D)
            here = tl.cast(head, tl.int64) * total + start + row
            logsum = tl.load(lse + here, mask=row < rows, other=float("inf"))
            means = tl.load(mean + here, mask=row < rows, other=0.0)
            s = _with_places(
                tl.dot(keys, tl.trans(tile)), of_queries, of_keys, places, start, head, total, first, at, rows, count,
                far, C2P, P2C, PLACES, M, N, True,
            )  # fmt: skip
            s, tanh = _scores(
                s, row[None, :], column[:, None], first, at, rows, count, window,
                slope, offsets, head * (2 * longest + 1), longest, scale, softcap,
                CAUSAL, WINDOWED, SOFTCAP, SLOPED, OFFSETS, M, N,
            )  # fmt: skip
            p = tl.exp2(s - logsum[None, :])
            ds = tl.dot(values, tl.trans(d))
            weights = p
            if DROPS:
                kept_here = tl.trans(_keep(base + row, (key_base + at) // 8, key, site, now, threshold, M, N))
                ds = tl.where(kept_here, ds * kept, 0.0)
                weights = tl.where(kept_here, p * kept, 0.0)
            dvs += tl.dot(weights.to(d.dtype), d)
            ds = p * (ds - means[None, :])
            if SOFTCAP:
                ds = ds * (1.0 - tanh * tanh)
            if P2C:
                _store_pairs(pairs, ds * scale, start, head, total, at, first, count, rows, width, N, M)
            dks += tl.dot(ds.to(tile.dtype), tile)
    _store(dk, dks * scale, key_start, at, count, dk_token, part.to(tl.int64) * dk_head, N, WIDE, D)
    _store(dv, dvs, key_start, at, count, dk_token, part.to(tl.int64) * dk_head, N, WIDE, D)
