"""Triton kernels of the gated delta rule (megalora.ops.delta_rule has the formulas and the names), forward.

Products are of 16-bit operands, as q, k and v come, with sums in float32. q and k go into them as they are, so that
they lose nothing: their lengths are factors of rows and columns beside the product. The inverse T is float32, by
products in three of bfloat16: at most 2e-5 off, with keys that are nearly equal, where its rounding for the products
that read it is 1e-3. (Three of TF32 are 4e-7 off, but their operands take five times the stores to shared memory.) A
state is float32 in registers, and is rounded where a product reads it.

What is computed of a head depends on that head alone, by one program a tile, each sum in one order: the same numbers
for any number of heads, documents or programs. So a kernel is never compiled for a number of heads or tokens.

Only a GPU's path imports this module (megalora.ops.fused_delta).

Legend: C tokens of a chunk, K and V features of a key and a value, i and j tokens of a chunk, `heads` value heads of
which REPEATS read a key head. Rows behind the end of a document's last chunk are zero, and are not stored.

places of tensors, tokens in rows:
    q, k, v        [tokens, heads' features] of one row stride
    U, W, T        [tokens, heads, V | K | C]
    G, beta, norms [heads, tokens] float32: sums of g within the chunk, beta, 1 / length of k
    states         [chunks, heads, K, V], which enter
    chunks         [chunks, 2] int32, the tokens from where to before where
    documents      [documents, 3] int32, the same and the first chunk
Chunks and documents may be empty, at the end of the tokens (Documents.put): nothing is stored for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megalora.ops.fused_delta_step import softplus


@triton.jit
def rows_of(base, start, stop, stride, C: tl.constexpr, WIDTH: tl.constexpr):
    """Load [C, WIDTH] from rows `start` on; zeros from `stop` on."""
    place = tl.arange(0, C)
    at = base + start.to(tl.int64) * stride + (place[:, None] * stride + tl.arange(0, WIDTH)[None, :])
    return tl.load(at, mask=(start + place < stop)[:, None], other=0.0)


@triton.jit
def put_rows(base, rows, start, stop, stride, C: tl.constexpr, WIDTH: tl.constexpr):
    """Store [C, WIDTH] to rows from `start` to before `stop`, rounded."""
    place = tl.arange(0, C)
    at = base + start.to(tl.int64) * stride + (place[:, None] * stride + tl.arange(0, WIDTH)[None, :])
    tl.store(at, rows.to(base.dtype.element_ty), mask=(start + place < stop)[:, None])


@triton.jit
def numbers_of(base, head, tokens, start, stop, C: tl.constexpr):
    """Load [C] of a head from [heads, tokens]; zeros from `stop` on."""
    at = start + tl.arange(0, C)
    return tl.load(base + head.to(tl.int64) * tokens + at, mask=at < stop, other=0.0)


@triton.jit
def state_of(states, number, head, heads, K: tl.constexpr, V: tl.constexpr):
    """Load the state [K, V] of a chunk and a head."""
    at = tl.arange(0, K)[:, None] * V + tl.arange(0, V)[None, :]
    return tl.load(states + (number.to(tl.int64) * heads + head) * (K * V) + at)


@triton.jit
def last_of(G, head, tokens, start, stop, C: tl.constexpr):
    """Load G of the last token of the chunk that begins at `start`, or of the document's."""
    return tl.load(G + head.to(tl.int64) * tokens + tl.minimum(start + C, stop) - 1)


@triton.jit
def decay_of(g, C: tl.constexpr):
    """Return D [C, C] = exp(G_i - G_j) for i >= j, else 0."""
    place = tl.arange(0, C)
    # G falls: the minimum is of what is not kept, which would be infinite.
    return tl.where(place[:, None] >= place[None, :], tl.exp(tl.minimum(g[:, None] - g[None, :], 0.0)), 0.0)


@triton.jit
def inverse_length(x, eps):
    """Return 1 / length of each row of x [C, n]."""
    wide = x.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, 1) + eps)


@triton.jit
def unit_inverse(lower, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Return (1 + lower)^-1 [C, C] of a strictly lower triangular matrix, C = 2^LEVELS.

    From inverses of blocks on the diagonal to those of twice the size: [[P, 0], [Q, R]]^-1 has -R^-1 Q P^-1 below.
    Unlike powers of `lower` no term outgrows the inverse, whose entries are at most 1 here.
    """
    place = tl.arange(0, C)
    row, column = place[:, None], place[None, :]
    inverse = tl.where(row == column, 1.0, tl.where(row >> 1 == column >> 1, -lower, 0.0))
    for level in tl.static_range(1, LEVELS):
        below = (row >> level + 1 == column >> level + 1) & (row >> level != column >> level)
        first = tl.dot(tl.where(below, lower, 0.0), inverse, input_precision=PRECISION)
        inverse -= tl.dot(inverse, first, input_precision=PRECISION)
    return inverse


@triton.jit(do_not_specialize=["tokens", "heads", "y_octets"])
def solve_kernel(
    k, v, b, a, decay, bias, chunks, U, W, T, G, betas, norms, tokens, heads, stride, y_octets, eps,
    REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Compute U, W, G, beta and norms; with KEEP also T. Programs: chunks, heads.

    b, a  columns of beta = sigmoid(b) and g = -exp(decay) softplus(a + bias), in rows of 8 y_octets
    """
    number, head = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(chunks + 2 * number), tl.load(chunks + 2 * number + 1)
    place = tl.arange(0, C)
    inside, at = start + place < stop, (start + place).to(tl.int64)
    beta = tl.sigmoid(tl.load(b + at * (y_octets * 8) + head, mask=inside, other=0.0).to(tl.float32))
    beta = tl.where(inside, beta, 0.0)
    step = tl.load(a + at * (y_octets * 8) + head, mask=inside, other=0.0).to(tl.float32) + tl.load(bias + head)
    g = tl.cumsum(tl.where(inside, -tl.exp(tl.load(decay + head)) * softplus(step), 0.0), 0)
    keys = rows_of(k + head // REPEATS * K, start, stop, stride, C, K)
    norm = inverse_length(keys, eps)
    at += head.to(tl.int64) * tokens
    tl.store(G + at, g, mask=inside)
    tl.store(betas + at, beta, mask=inside)
    tl.store(norms + at, norm, mask=inside)
    alike = tl.dot(keys, tl.trans(keys)) * (norm * beta)[:, None] * norm[None, :] * decay_of(g, C)
    inverse = unit_inverse(tl.where(place[:, None] > place[None, :], alike, 0.0), C, LEVELS, PRECISION)
    narrow: tl.constexpr = U.dtype.element_ty
    if KEEP:
        put_rows(T + head * C, inverse, start, stop, heads * C, C, C)
    found = tl.dot((inverse * (beta * norm * tl.exp(g))[None, :]).to(narrow), keys)
    put_rows(W + head * K, found, start, stop, heads * K, C, K)
    values = rows_of(v + head * V, start, stop, stride, C, V)
    found = tl.dot((inverse * beta[None, :]).to(narrow), values)
    put_rows(U + head * V, found, start, stop, heads * V, C, V)


@triton.jit(do_not_specialize=["tokens", "heads"])
def scan_kernel(
    k, W, U, G, norms, documents, states, tokens, heads, stride,
    REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute the state that enters each chunk, and put U - W S in the place of U. Programs: documents and blocks of BV
    features, heads.

    The factors of the next chunk are loaded a turn ahead.
    """
    block, head = tl.program_id(0) % (V // BV), tl.program_id(1)
    document = documents + 3 * (tl.program_id(0) // (V // BV))
    start, stop, number = tl.load(document), tl.load(document + 1), tl.load(document + 2)
    narrow: tl.constexpr = U.dtype.element_ty
    k += head // REPEATS * K
    W += head * K
    U += head * V + block * BV
    at = tl.arange(0, K)[:, None] * V + (block * BV + tl.arange(0, BV))[None, :]
    states += (number.to(tl.int64) * heads + head) * (K * V)
    state = tl.zeros((K, BV), tl.float32)
    last = last_of(G, head, tokens, start, stop, C)
    g, norm = numbers_of(G, head, tokens, start, stop, C), numbers_of(norms, head, tokens, start, stop, C)
    for turn in range(tl.cdiv(stop - start, C)):
        first = start + turn * C
        entering = state.to(narrow)
        tl.store(states + at, entering)
        states += heads.to(tl.int64) * (K * V)
        put, whole = (norm * tl.exp(last - g))[:, None], tl.exp(last)
        last = last_of(G, head, tokens, first + C, stop, C)
        g = numbers_of(G, head, tokens, first + C, stop, C)
        norm = numbers_of(norms, head, tokens, first + C, stop, C)
        reads = rows_of(W, first, stop, heads * K, C, K)
        changes = rows_of(U, first, stop, heads * V, C, BV).to(tl.float32) - tl.dot(reads, entering)
        put_rows(U, changes, first, stop, heads * V, C, BV)
        keys = rows_of(k, first, stop, stride, C, K)
        state = tl.dot(tl.trans(keys), (changes * put).to(narrow), acc=state * whole)


@triton.jit
def outputs_of(
    q, k, U, G, norms, states, start, stop, number, head, tokens, heads, stride, eps,
    REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Return (o [C, V] float32, (q k^T) * D [C, C] with lengths, the factors of q [C] that make its length K^-0.5)."""
    queries = rows_of(q + head // REPEATS * K, start, stop, stride, C, K)
    keys = rows_of(k + head // REPEATS * K, start, stop, stride, C, K)
    g, norm = numbers_of(G, head, tokens, start, stop, C), numbers_of(norms, head, tokens, start, stop, C)
    scale = inverse_length(queries, eps) * K**-0.5
    seen = tl.dot(queries, tl.trans(keys)) * scale[:, None] * norm[None, :] * decay_of(g, C)
    o = tl.dot(queries, state_of(states, number, head, heads, K, V)) * (scale * tl.exp(g))[:, None]
    changes = rows_of(U + head * V, start, stop, heads * V, C, V)
    return tl.dot(seen.to(U.dtype.element_ty), changes, acc=o), seen, scale


@triton.jit(do_not_specialize=["tokens", "heads", "y_octets"])
def output_kernel(
    q, k, U, G, norms, states, chunks, z, weight, out, tokens, heads, stride, y_octets, out_stride, eps, norm_eps,
    REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute out [tokens, heads V] = RMSNorm(o) * silu(z), with U - W S in the place of U. Programs: chunks, heads."""
    number, head = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(chunks + 2 * number), tl.load(chunks + 2 * number + 1)
    o, _, _ = outputs_of(
        q, k, U, G, norms, states, start, stop, number, head, tokens, heads, stride, eps, REPEATS, K, V, C
    )
    inverse = tl.rsqrt(tl.sum(o * o, 1) / V + norm_eps)
    gate = rows_of(z + head * V, start, stop, y_octets * 8, C, V).to(tl.float32)
    scale = tl.load(weight + tl.arange(0, V)).to(tl.float32)
    o = o * inverse[:, None] * scale[None, :] * gate * tl.sigmoid(gate)
    put_rows(out + head * V, o, start, stop, out_stride, C, V)
