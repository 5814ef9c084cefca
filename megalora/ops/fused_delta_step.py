"""One token of linear attention (megalora.ops.delta_mixer) on a GPU, in two Triton kernels that bring what slots keep
forward in place: plain torch takes some thirty small operations a layer, and copies the states of all sequences twice.

    delta_step_kernel  convolution, norms of q and k, gates, S <- exp(g) S + beta k (v - exp(g) S^T k)^T, o = S^T q
    delta_end_kernel   RMSNorm(o) * silu(z); the kept channels move up by one token

A state is read and written once. Grids and addresses depend on shapes alone, so that a CUDA graph can hold them. Rows
of the idle slot, which belong to no sequence, cost nothing: what their slot keeps stays, and their results are zero.

Legend: as in megalora.ops.delta_mixer; B sequences, S slots. Only a GPU's path imports this module.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_V = 32  # features of a value that one program has: four programs a head of 128 fill a GPU with one sequence
_WARPS = 4


@triton.jit
def _convolved(y, kept, taps, column, inside, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return silu of the convolution of channels at `column`, rounded to the dtype of y, as float32."""
    total = tl.zeros(column.shape, tl.float32)
    for j in tl.static_range(WIDTH):
        tap = tl.load(taps + column * WIDTH + j, mask=inside, other=0.0).to(tl.float32)
        if j < WIDTH - 1:
            total += tl.load(kept + j * CHANNELS + column, mask=inside, other=0.0).to(tl.float32) * tap
        else:
            total += tl.load(y + column, mask=inside, other=0.0).to(tl.float32) * tap
    return (total / (1.0 + tl.exp(-total))).to(y.dtype.element_ty).to(tl.float32)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), with the digits of small results: they say how long a head remembers."""
    u = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(u < 0.01, u * (1.0 - u * (0.5 - u * (1.0 / 3))), tl.log(1.0 + u))


@triton.jit(do_not_specialize=["idle"])
def delta_step_kernel(
    y, y_stride, taps, decay, bias, channels, states, slots, idle, made,
    GROUPS: tl.constexpr, REPEATS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, WIDTH: tl.constexpr,
    EPSILON: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Bring one state [KEY, BLOCK_V] of a head forward, and write its o to made [B, H V].

    y [B, y_stride], taps [C, WIDTH], decay, bias [H], channels [S, WIDTH - 1, C], states [S, H, KEY, VALUE], slots [B]
    grid (blocks of a value, H, B)
    """
    HEADS: tl.constexpr = GROUPS * REPEATS
    CHANNELS: tl.constexpr = 2 * GROUPS * KEY + HEADS * VALUE
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.load(slots + row)
    if slot != idle:
        y += row * y_stride
        channels += slot * (CHANNELS * (WIDTH - 1))
        ks = tl.arange(0, BLOCK_K)
        vs = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
        in_k, in_v = ks < KEY, vs < VALUE
        at = states + (slot * HEADS + head) * (KEY * VALUE) + ks[:, None] * VALUE + vs[None, :]
        inside = in_k[:, None] & in_v[None, :]
        state = tl.load(at, mask=inside, other=0.0)

        of_q = head // REPEATS * KEY + ks
        q = _convolved(y, channels, taps, of_q, in_k, CHANNELS, WIDTH)
        k = _convolved(y, channels, taps, GROUPS * KEY + of_q, in_k, CHANNELS, WIDTH)
        v = _convolved(y, channels, taps, 2 * GROUPS * KEY + head * VALUE + vs, in_v, CHANNELS, WIDTH)
        q *= tl.rsqrt(tl.sum(q * q) + EPSILON) * (KEY**-0.5)
        k *= tl.rsqrt(tl.sum(k * k) + EPSILON)
        gates = y + CHANNELS + HEADS * VALUE + head
        b, a = tl.load(gates).to(tl.float32), tl.load(gates + HEADS).to(tl.float32) + tl.load(bias + head)
        g = -tl.exp(tl.load(decay + head)) * softplus(a)

        state *= tl.exp(g)
        change = (v - tl.sum(state * k[:, None], 0)) / (1.0 + tl.exp(-b))
        state += k[:, None] * change[None, :]
        tl.store(at, state, mask=inside)
        tl.store(made + (row * HEADS + head) * VALUE + vs, tl.sum(state * q[:, None], 0), mask=in_v)


@triton.jit(do_not_specialize=["idle"])
def delta_end_kernel(
    y, y_stride, made, norm, eps, channels, slots, idle, out,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, VALUE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the results of a head to out [B, H V], and move its share of the kept channels up.

    norm [V]; the others as above; grid (H, B)
    """
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    vs = tl.arange(0, BLOCK_V)
    in_v, result = vs < VALUE, out + (row * HEADS + head) * VALUE + vs
    if slot == idle:
        tl.store(result, tl.zeros([BLOCK_V], tl.float32).to(out.dtype.element_ty), mask=in_v)
    else:
        y += row * y_stride
        o = tl.load(made + (row * HEADS + head) * VALUE + vs, mask=in_v, other=0.0)
        z = tl.load(y + CHANNELS + head * VALUE + vs, mask=in_v, other=0.0).to(tl.float32)
        weight = tl.load(norm + vs, mask=in_v, other=0.0).to(tl.float32)
        normed = o * tl.rsqrt(tl.sum(o * o) / VALUE + eps) * weight
        tl.store(result, (normed * (z / (1.0 + tl.exp(-z)))).to(out.dtype.element_ty), mask=in_v)

        SHARE: tl.constexpr = (CHANNELS + HEADS - 1) // HEADS
        own = tl.arange(0, BLOCK_C)
        column = head * SHARE + own
        inside = (own < SHARE) & (column < CHANNELS)
        kept = channels + slot * (CHANNELS * (WIDTH - 1)) + column
        for j in tl.static_range(WIDTH - 1):
            if j < WIDTH - 2:
                next_one = tl.load(kept + (j + 1) * CHANNELS, mask=inside)
            else:
                next_one = tl.load(y + column, mask=inside)
            tl.store(kept + j * CHANNELS, next_one, mask=inside)


def fused_delta_step(
    y: torch.Tensor,
    heads: tuple[int, int, int, int],
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    kept: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    idle: int | None,
    eps: float,
    epsilon: float,
) -> torch.Tensor:
    """Return as `delta_mixer_step`, of what kernels take (delta_mixer.takes_step).

    heads    as delta_mixer.Heads
    weights  convolution, decay, bias and norm
    eps      of that norm; epsilon: of the norms of q and k
    """
    groups, repeats, key, value = heads
    convolution, decay, bias, norm = weights
    channels, states = kept
    count, width, number = len(y), convolution.shape[1], groups * repeats
    all_channels, idle = convolution.shape[0], -1 if idle is None else idle
    made = torch.empty(count, number * value, dtype=torch.float32, device=y.device)
    out = torch.empty(made.shape, dtype=y.dtype, device=y.device)
    block_v = min(_BLOCK_V, triton.next_power_of_2(value))
    delta_step_kernel[(triton.cdiv(value, block_v), number, count)](
        y, y.stride(0), convolution, decay, bias, channels, states, slots, idle, made,
        groups, repeats, key, value, width, epsilon, triton.next_power_of_2(key), block_v, num_warps=_WARPS,
    )  # fmt: skip
    share = triton.cdiv(all_channels, number)
    delta_end_kernel[(number, count)](
        y, y.stride(0), made, norm, eps, channels, slots, idle, out, all_channels, number, value, width,
        triton.next_power_of_2(value), triton.next_power_of_2(share), num_warps=_WARPS,
    )  # fmt: skip
    return out
