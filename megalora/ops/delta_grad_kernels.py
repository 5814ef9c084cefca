"""Triton kernels of the gated delta rule, backward: megalora.ops.delta_kernels says what holds of all and where tensors
lie.

With R = U - W S, the changes, S' the state behind the chunk, p the factors of keys in it (p_i = exp(G_last - G_i)), and
lengths of q and k left out:
    P = (q k^T) * D;  o = (q * exp(G)) S + P R;  S' = exp(G_last) S + (k * p)^T R
    R = T X;  X = beta * (v - exp(G) * (k S))
    dR = P^T do + (k * p) dS';  dX = T^T dR;  dA = -(dX R^T) below the diagonal, of A = T^-1 - 1
    dS = (q * exp(G))^T do + exp(G_last) dS' - W^T dR
so that neither U nor W is needed for the rest. D gives G a sum over rows less one over columns, of one matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megalora.ops.delta_kernels import (
    decay_of,
    last_of,
    numbers_of,
    outputs_of,
    put_rows,
    rows_of,
    state_of,
)


@triton.jit(do_not_specialize=["tokens", "heads", "y_octets", "dy_octets"])
def output_backward_kernel(
    q, k, U, G, norms, states, chunks, z, weight, dout, do, dz, dR, scales,
    tokens, heads, stride, y_octets, dy_octets, out_stride, eps, norm_eps,
    REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute do and dR [tokens, heads, V], the latter without what S' gives, dz, and the factors of q, scales
    [heads, tokens]. Programs: chunks, heads.
    """
    number, head = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(chunks + 2 * number), tl.load(chunks + 2 * number + 1)
    o, seen, scale = outputs_of(
        q, k, U, G, norms, states, start, stop, number, head, tokens, heads, stride, eps, REPEATS, K, V, C
    )
    at = start + tl.arange(0, C)
    tl.store(scales + head.to(tl.int64) * tokens + at, scale, mask=at < stop)
    inverse = tl.rsqrt(tl.sum(o * o, 1) / V + norm_eps)
    o *= inverse[:, None]
    gate = rows_of(z + head * V, start, stop, y_octets * 8, C, V).to(tl.float32)
    grad = rows_of(dout + head * V, start, stop, out_stride, C, V).to(tl.float32)
    grad *= tl.load(weight + tl.arange(0, V)).to(tl.float32)[None, :]
    opened = tl.sigmoid(gate)
    of_gate = grad * o  # silu' = sigmoid + silu (1 - sigmoid), by what other terms need too
    grad *= gate * opened
    product = grad * o
    of_gate = product + opened * (of_gate - product)
    put_rows(dz + head * V, of_gate, start, stop, dy_octets * 8, C, V)
    grad = (grad - o * (tl.sum(product, 1) / V)[:, None]) * inverse[:, None]
    narrow: tl.constexpr = do.dtype.element_ty
    grad = grad.to(narrow)
    put_rows(do + head * V, grad, start, stop, heads * V, C, V)
    found = tl.dot(tl.trans(seen.to(narrow)), grad)
    put_rows(dR + head * V, found, start, stop, heads * V, C, V)


@triton.jit(do_not_specialize=["tokens", "heads"])
def scan_backward_kernel(
    q, k, W, do, dR, G, norms, scales, documents, dstates, tokens, heads, stride,
    REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the state behind each chunk, dstates, and add what it gives to dR. Programs: documents
    and blocks of BV features, heads.

    The factors of the next chunk are loaded a turn ahead.
    """
    block, head = tl.program_id(0) % (V // BV), tl.program_id(1)
    document = documents + 3 * (tl.program_id(0) // (V // BV))
    start, stop, number = tl.load(document), tl.load(document + 1), tl.load(document + 2)
    narrow: tl.constexpr = dR.dtype.element_ty
    q += head // REPEATS * K
    k += head // REPEATS * K
    W += head * K
    do += head * V + block * BV
    dR += head * V + block * BV
    count = tl.cdiv(stop - start, C)
    at = tl.arange(0, K)[:, None] * V + (block * BV + tl.arange(0, BV))[None, :]
    dstates += ((number + count - 1).to(tl.int64) * heads + head) * (K * V)
    grad = tl.zeros((K, BV), tl.float32)
    first = start + tl.maximum(count - 1, 0) * C  # a document may be empty
    last = last_of(G, head, tokens, first, stop, C)
    g, norm = numbers_of(G, head, tokens, first, stop, C), numbers_of(norms, head, tokens, first, stop, C)
    scale = numbers_of(scales, head, tokens, first, stop, C)
    for turn in range(count):
        behind = grad.to(narrow)
        tl.store(dstates + at, behind)
        dstates -= heads.to(tl.int64) * (K * V)
        put, whole, taken = (norm * tl.exp(last - g))[:, None], tl.exp(last), (scale * tl.exp(g))[:, None]
        first = start + (count - 1 - turn) * C
        before = tl.maximum(first - C, start)
        last = last_of(G, head, tokens, before, stop, C)
        g, norm = numbers_of(G, head, tokens, before, stop, C), numbers_of(norms, head, tokens, before, stop, C)
        scale = numbers_of(scales, head, tokens, before, stop, C)
        keys = rows_of(k, first, stop, stride, C, K)
        changes = rows_of(dR, first, stop, heads * V, C, BV).to(tl.float32) + tl.dot(keys, behind) * put
        put_rows(dR, changes.to(narrow), first, stop, heads * V, C, BV)
        queries = rows_of(q, first, stop, stride, C, K)
        outputs = rows_of(do, first, stop, heads * V, C, BV).to(tl.float32) * taken
        grad = tl.dot(tl.trans(queries), outputs.to(narrow), acc=grad * whole)
        reads = rows_of(W, first, stop, heads * K, C, K)
        grad = tl.dot(tl.trans(reads), (-changes).to(narrow), acc=grad)


@triton.jit(do_not_specialize=["tokens", "heads", "dy_octets"])
def system_backward_kernel(
    q, k, R, T, G, betas, norms, scales, do, dR, chunks, dv, db, pairs, system, dG, tokens, heads, stride, dy_octets,
    REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute dv and db, put dX in the place of dR, and what pairs of tokens give. Programs: chunks, heads.

    pairs, system  [tokens, heads, C] of each token i: gradients of q k^T and of the lower k k^T, without lengths
    dG             [heads, tokens] float32: that of the sums without what states give
    """
    number, head = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(chunks + 2 * number), tl.load(chunks + 2 * number + 1)
    narrow: tl.constexpr = T.dtype.element_ty
    place = tl.arange(0, C)
    queries = rows_of(q + head // REPEATS * K, start, stop, stride, C, K)
    keys = rows_of(k + head // REPEATS * K, start, stop, stride, C, K)
    g, beta = numbers_of(G, head, tokens, start, stop, C), numbers_of(betas, head, tokens, start, stop, C)
    scale, norm = numbers_of(scales, head, tokens, start, stop, C), numbers_of(norms, head, tokens, start, stop, C)
    changes = rows_of(R + head * V, start, stop, heads * V, C, V)
    outputs = rows_of(do + head * V, start, stop, heads * V, C, V)
    decay = decay_of(g, C)
    found = tl.dot(outputs, tl.trans(changes)) * decay * scale[:, None] * norm[None, :]
    put_rows(pairs + head * C, found, start, stop, heads * C, C, C)
    of_decay = found * tl.dot(queries, tl.trans(keys))
    of_changes = rows_of(dR + head * V, start, stop, heads * V, C, V)
    inverse = rows_of(T + head * C, start, stop, heads * C, C, C)
    right = tl.dot(tl.trans(inverse), of_changes)
    # All that beta scales, what is read of v, states and other tokens, is R / beta.
    of_b = tl.sum(right * changes.to(tl.float32), 1) * (1.0 - beta)
    at = start + place
    inside = at < stop
    tl.store(db + at.to(tl.int64) * (dy_octets * 8) + head, of_b.to(db.dtype.element_ty), mask=inside)
    put_rows(dv + head * V, right * beta[:, None], start, stop, stride, C, V)
    right = right.to(narrow)
    put_rows(dR + head * V, right, start, stop, heads * V, C, V)
    found = tl.dot(right, tl.trans(changes)) * -decay * norm[:, None] * norm[None, :]
    found = tl.where(place[:, None] > place[None, :], found, 0.0)
    found *= beta[:, None]
    put_rows(system + head * C, found, start, stop, heads * C, C, C)
    of_decay += found * tl.dot(keys, tl.trans(keys))
    tl.store(dG + head.to(tl.int64) * tokens + at, tl.sum(of_decay, 1) - tl.sum(of_decay, 0), mask=inside)


@triton.jit
def put_directions(to, grad, x, length, start, stop, stride, C: tl.constexpr, K: tl.constexpr):
    """Store the gradient of x [C, K], of which grad is that where its inverse length [C] were a constant."""
    x = x.to(tl.float32)
    along = tl.sum(grad * x, 1) * (length * length)
    put_rows(to, grad - x * along[:, None], start, stop, stride, C, K)


@triton.jit(do_not_specialize=["tokens", "heads"])
def query_backward_kernel(
    q, k, G, scales, states, do, pairs, dG, chunks, dq, tokens, heads, stride,
    REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute dq, and add to dG what outputs read of states. Programs: chunks, key heads, each of which sums over its
    value heads.
    """
    number, group = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(chunks + 2 * number), tl.load(chunks + 2 * number + 1)
    queries, keys = rows_of(q + group * K, start, stop, stride, C, K), rows_of(k + group * K, start, stop, stride, C, K)
    grad = tl.zeros((C, K), tl.float32)
    at = start + tl.arange(0, C)
    for r in range(REPEATS):
        head = group * REPEATS + r
        outputs = rows_of(do + head * V, start, stop, heads * V, C, V)
        state = state_of(states, number, head, heads, K, V)
        g, scale = numbers_of(G, head, tokens, start, stop, C), numbers_of(scales, head, tokens, start, stop, C)
        found = tl.dot(outputs, tl.trans(state)) * (scale * tl.exp(g))[:, None]
        sums = dG + head.to(tl.int64) * tokens + at
        of_g = tl.load(sums, mask=at < stop, other=0.0) + tl.sum(found * queries.to(tl.float32), 1)
        tl.store(sums, of_g, mask=at < stop)
        own = rows_of(pairs + head * C, start, stop, heads * C, C, C)
        grad = tl.dot(own, keys, acc=grad + found)
    scale = numbers_of(scales, group * REPEATS, tokens, start, stop, C)
    put_directions(dq + group * K, grad, queries, scale * K**0.5, start, stop, stride, C, K)


@triton.jit
def alike_states(states, dstates, number, head, heads, K: tl.constexpr, V: tl.constexpr):
    """Return the sum of a state times its gradient, a few rows at a time, which are in the cache: whole ones take
    twice the registers that there are.
    """
    ROWS: tl.constexpr = 16
    at = tl.arange(0, ROWS)[:, None] * V + tl.arange(0, V)[None, :]
    at += (number.to(tl.int64) * heads + head) * (K * V)
    total = tl.zeros((ROWS, V), tl.float32)
    for _ in range(0, K, ROWS):
        total += tl.load(states + at).to(tl.float32) * tl.load(dstates + at).to(tl.float32)
        at += ROWS * V
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit(do_not_specialize=["tokens", "heads", "y_octets", "dy_octets"])
def key_backward_kernel(
    q, k, a, decay, bias, R, G, betas, norms, states, dstates, dX, pairs, system, dG, chunks,
    dk, da, tokens, heads, stride, y_octets, dy_octets,
    REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of k and a, after the other kernels. Programs: as of query_backward_kernel."""
    number, group = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(chunks + 2 * number), tl.load(chunks + 2 * number + 1)
    queries, keys = rows_of(q + group * K, start, stop, stride, C, K), rows_of(k + group * K, start, stop, stride, C, K)
    grad = tl.zeros((C, K), tl.float32)
    at = start + tl.arange(0, C)
    inside = at < stop
    for r in range(REPEATS):
        head = group * REPEATS + r
        g, norm = numbers_of(G, head, tokens, start, stop, C), numbers_of(norms, head, tokens, start, stop, C)
        last = last_of(G, head, tokens, start, stop, C)
        # The state behind the chunk.
        changes = rows_of(R + head * V, start, stop, heads * V, C, V)
        behind = state_of(dstates, number, head, heads, K, V)
        found = tl.dot(changes, tl.trans(behind)) * (norm * tl.exp(last - g))[:, None]
        put = tl.sum(found * keys.to(tl.float32), 1)
        grad += found
        state = state_of(states, number, head, heads, K, V)
        # The state before it.
        beta = numbers_of(betas, head, tokens, start, stop, C)
        right = rows_of(dX + head * V, start, stop, heads * V, C, V)
        found = tl.dot(right, tl.trans(state)) * (-norm * tl.exp(g))[:, None]
        read = tl.sum(found * keys.to(tl.float32), 1)
        grad += found * beta[:, None]
        own = rows_of(pairs + head * C, start, stop, heads * C, C, C)
        grad = tl.dot(tl.trans(own), queries, acc=grad)
        own = rows_of(system + head * C, start, stop, heads * C, C, C)
        grad = tl.dot(own, keys, acc=grad)
        grad = tl.dot(tl.trans(own), keys, acc=grad)
        of_g = numbers_of(dG, head, tokens, start, stop, C) + read * beta - put
        # The decay of a token is in all sums from it on.
        kept = alike_states(states, dstates, number, head, heads, K, V)
        of_g = tl.cumsum(of_g, 0, reverse=True) + tl.sum(put, 0) + tl.exp(last) * kept
        step = tl.load(a + at.to(tl.int64) * (y_octets * 8) + head, mask=inside, other=0.0).to(tl.float32)
        of_a = -of_g * tl.exp(tl.load(decay + head)) * tl.sigmoid(step + tl.load(bias + head))
        tl.store(da + at.to(tl.int64) * (dy_octets * 8) + head, of_a.to(da.dtype.element_ty), mask=inside)
    norm = numbers_of(norms, group * REPEATS, tokens, start, stop, C)
    put_directions(dk + group * K, grad, keys, norm, start, stop, stride, C, K)
