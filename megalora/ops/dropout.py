"""Stateless dropout: a mask is a function of (seed, site, step, token, feature), drawn again, never stored.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), called once for each
token and block of eight features:

    key     = (seed folded to 32 bits, site)
    counter = (token's low word, feature // 8, step, token's high word)
    lane j of a block = bits 16·(j % 2) .. +16 of output word j // 2, for feature 8·block + j

A feature is dropped where its lane < threshold = round(p·65536). Kept values are scaled by
65536 / (65536 - threshold). Arithmetic is in float64 for float64 and in float32 for all other types: the
scale is rounded to that type, then the product is, then the sum of `dropout_add_`, and last the result to the
tensor's own type. The C++ op takes the same steps, so its bits equal those of the torch reference below.

Legend: T tokens, F features of this rank's slice. Autograd sees none of it: callers are autograd.Functions.
"""

import hashlib
from dataclasses import dataclass

import torch

from megalora.errors import UserError
from megalora.ops import extension, limits

LANE_RANGE = 1 << 16  # a lane is one of 0 .. 65535
WORD_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """All that a mask depends on besides the tokens.

    p               the probability of dropping, in [0, 1), rounded to a multiple of 2⁻¹⁶
    seed            the run's, any 64-bit integer
    site            number of the layer input, 0 .. 2³²-1; the layers that share an input share its site
    step            number of the optimizer step, 0 .. 2³²-1; or an int64 scalar on the tokens' device that holds it,
                    which kernels read when they run (a CUDA graph is captured once and replayed at every step)
    feature_offset  the global feature that is column 0 of this rank's slice
    """

    p: float
    seed: int
    site: int
    step: int | torch.Tensor
    feature_offset: int = 0

    def __post_init__(self):
        if not 0.0 <= self.p < 1.0 or self.threshold == LANE_RANGE:
            raise UserError(f"dropout p={self.p} is outside [0, 0.99999]", "correct lora_dropout")
        assert 0 <= self.site <= WORD_MASK, f"site {self.site} does not fit 32 bits"
        assert isinstance(self.step, torch.Tensor) or 0 <= self.step <= WORD_MASK, f"step {self.step} exceeds 32 bits"
        assert self.feature_offset >= 0, f"feature_offset {self.feature_offset} is negative"

    @property
    def threshold(self) -> int:
        return round(self.p * LANE_RANGE)

    @property
    def scale(self) -> float:
        return LANE_RANGE / (LANE_RANGE - self.threshold)

    @property
    def key(self) -> int:
        """The seed's two words folded into one, the first key word."""
        return (self.seed ^ (self.seed >> 32)) & WORD_MASK


def dropout(x: torch.Tensor, token_index: torch.Tensor, spec: Dropout) -> torch.Tensor:
    """Return x̂ = m ⊙ x. x [T, F] floating; token_index [T] int64, a token's place in the global batch of the step.

    Returns [T, F] of x's dtype: x·scale where kept, +0 where dropped (even of a NaN); x itself if p = 0.
    """
    if spec.threshold == 0:
        return x
    if _compiled(spec, x):
        return torch.ops.megalora.dropout(x, token_index, *op_arguments(spec))
    return dropout_reference(x, token_index, spec)


def drop(x: torch.Tensor, token_index: torch.Tensor, spec: Dropout | None) -> torch.Tensor:
    """Return `dropout` of x [T, F], for autograd: the gradient goes through the same mask, drawn again. None: x."""
    if spec is None or spec.threshold == 0:
        return x
    return _Dropped.apply(x, token_index, spec)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token_index, spec):
        ctx.save_for_backward(token_index)
        ctx.spec = spec
        return dropout(x, token_index, spec)

    @staticmethod
    def backward(ctx, dy):
        (token_index,) = ctx.saved_tensors
        return dropout(dy, token_index, ctx.spec), None, None


def named_site(name: str) -> int:
    """Return the site of that name: a hash, with the highest of its 32 bits set; those below have numbers by layer."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") | 1 << 31


def dropout_add_(out: torch.Tensor, g: torch.Tensor, token_index: torch.Tensor, spec: Dropout) -> None:
    """Compute out += m ⊙ g in place: the term that dropout's backward adds to dx. Dropped places stay as they are.

    out, g [T, F] of one floating dtype, the features of out adjacent in memory; token_index [T] int64.
    """
    if spec.threshold == 0:
        out.add_(g)
    elif _compiled(spec, out, g):
        torch.ops.megalora.dropout_add_(out, g, token_index, *op_arguments(spec))
    else:
        dropout_add_reference_(out, g, token_index, spec)


def _compiled(spec: Dropout, *matrices: torch.Tensor) -> bool:
    """Return whether kernels take it: on a GPU not in float64, features in eights, rows on 16 bytes."""
    device_type = matrices[0].device.type
    if not extension.has_kernels(device_type):
        return False
    return device_type == "cpu" or all(
        matrix.dtype != torch.float64
        and matrix.shape[1] % limits.OCTET == spec.feature_offset % limits.OCTET == 0
        and matrix.stride(1) == 1
        and matrix.stride(0) * matrix.itemsize % limits.ALIGNMENT == matrix.data_ptr() % limits.ALIGNMENT == 0
        for matrix in matrices
    )


def op_arguments(spec: Dropout) -> tuple[int, int, int, int, float, torch.Tensor | None]:
    """Return what the compiled ops take of it: seed, site, step, feature_offset, p, live_step."""
    step, live_step = (0, spec.step) if isinstance(spec.step, torch.Tensor) else (spec.step, None)
    return spec.key, spec.site, step, spec.feature_offset, spec.p, live_step


# ---- the reference, in plain torch, on any device


def dropout_reference(x: torch.Tensor, token_index: torch.Tensor, spec: Dropout) -> torch.Tensor:
    """Return what `dropout` must give, to the bit."""
    keep = keep_mask(token_index, x.shape[1], spec)
    return torch.where(keep, x.to(_arithmetic_dtype(x)) * spec.scale, 0.0).to(x.dtype)


def dropout_add_reference_(out: torch.Tensor, g: torch.Tensor, token_index: torch.Tensor, spec: Dropout) -> None:
    """Compute what `dropout_add_` must give, to the bit."""
    keep = keep_mask(token_index, g.shape[1], spec)
    dtype = _arithmetic_dtype(out)
    total = out.to(dtype) + g.to(dtype) * spec.scale
    out.copy_(torch.where(keep, total.to(out.dtype), out))


def _arithmetic_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def keep_mask(token_index: torch.Tensor, features: int, spec: Dropout) -> torch.Tensor:
    """Return which features are kept: bool [T, features], on token_index's device. token_index [T] int64."""
    first_block, skip = divmod(spec.feature_offset, 8)
    blocks = -(-(skip + features) // 8)
    block = torch.arange(first_block, first_block + blocks, device=token_index.device)
    token = token_index[:, None]
    words = philox4x32((token, block, spec.step, token >> 32), (spec.key, spec.site))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    lanes = torch.stack(halves, dim=-1).flatten(1)  # [T, blocks, 8] -> [T, 8·blocks]
    return lanes[:, skip : skip + features] >= spec.threshold


def philox4x32(counter, key: tuple[int, int], rounds: int = 10) -> tuple[torch.Tensor, ...]:
    """Return four output words, int64 in 0 .. 2³²-1, of the broadcast shape of the counter's four words.

    counter: four int64 tensors or ints, of which the low 32 bits count (at least the first a tensor).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(
        *(torch.as_tensor(word, device=counter[0].device) & WORD_MASK for word in counter)
    )
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2⁶⁴, so their bits are those of the unsigned product.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((product2 >> 32) & WORD_MASK) ^ c1 ^ k0
        c2 = ((product0 >> 32) & WORD_MASK) ^ c3 ^ k1
        c1, c3 = product2 & WORD_MASK, product0 & WORD_MASK
        k0, k1 = (k0 + 0x9E3779B9) & WORD_MASK, (k1 + 0xBB67AE85) & WORD_MASK
    return c0, c1, c2, c3
