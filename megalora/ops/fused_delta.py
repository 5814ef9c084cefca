"""megalora.ops.delta_mixer on GPUs, by the kernels of megalora.ops.delta_kernels, delta_grad_kernels and
convolution_kernels: four forward and nine backward, which begin with the first three of forward again.

Kept is y alone. So many heads go at a time that what backward makes stays small.

Legend: as in megalora.ops.delta_mixer; N chunks.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from megalora.ops import limits
from megalora.ops.delta_rule import CHUNK, EPSILON, Documents
from megalora.ops.extension import has_triton
from megalora.ops.fused_attention import on

# Features of a key and a value: what has run on a GPU. With values of 32, ptxas 12.8, which Triton 3.6 brings, takes
# the descriptor of a state in output_kernel from a uniform register that nothing wrote: an illegal memory access.
TAKEN = (128, 128), (16, 128)
MOST_ROWS = 1 << 19  # tokens times value heads at once
STATE_COLUMNS = 32  # of a state that one program carries from chunk to chunk
CHANNELS = 128  # of a tile of the convolution
ROWS = {"convolution": 16, "convolution_backward": 32}  # of one
# Warps and stages of the loads of loops. Fixed: the same run has the same numbers. Three stages of scan_backward take
# 172 KiB of shared memory on Hopper, which has 227, and 64 on an A100, whose products read registers.
LAUNCHES = {
    "solve": (4, 1), "scan": (4, 3), "output": (4, 1), "output_backward": (4, 1), "scan_backward": (4, 3),
    "system_backward": (4, 1), "query_backward": (4, 1), "key_backward": (4, 1),
    "convolution": (4, 1), "convolution_backward": (8, 1),
}  # fmt: skip


@functools.cache
def precision() -> str:
    """Return that of products in the inverse: in three of bfloat16, or of TF32 where Triton does not have those."""
    from triton.backends.nvidia.compiler import CUDAOptions

    return "bf16x3" if "bf16x3" in CUDAOptions.allowed_dot_input_precisions else "tf32x3"


def takes(dtype: torch.dtype, device: torch.device, key: int, value: int) -> bool:
    """Return whether the kernels take heads of so many features: bfloat16 on a GPU with the shared memory of an A100,
    keys of 16 or 128 features, values of 128."""
    alike = device.type == "cuda" and dtype == torch.bfloat16 and (key, value) in TAKEN
    return alike and has_triton() and _large_shared_memory(device)


def fuses(y: torch.Tensor, key: int, value: int) -> bool:
    """Return whether the kernels take y, with heads of so many features."""
    return len(y) > 0 and takes(y.dtype, y.device, key, value)


@functools.cache
def _large_shared_memory(device: torch.device) -> bool:
    found: Any = torch.cuda.get_device_properties(device)  # its types lack what it has
    return found.major >= 8 and found.shared_memory_per_block_optin >= limits.SHARED_MEMORY


def fused_delta_mixer(y: torch.Tensor, heads: Any, weights: Any, documents: Documents) -> torch.Tensor:
    """Return what `delta_mixer` does, of y that `fuses`."""
    return _Fused.apply(y, heads, weights, documents)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, heads, weights, documents):
        ctx.save_for_backward(y)
        ctx.how = heads, weights, documents
        out = y.new_empty(len(y), heads.widths[2])
        with on(y.device):
            for part in _parts(y, heads, weights, documents):
                part.forward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        grad = grad.contiguous()
        dy = _rows_on_octets(y)
        with on(y.device):
            for part in _parts(y, *ctx.how):
                part.backward(grad, dy)
        return dy, None, None, None


def _rows_on_octets(y: torch.Tensor) -> torch.Tensor:
    """Return room for the gradient of y, whose rows begin on 16 bytes."""
    width = y.shape[1]
    room = -(-width // limits.OCTET) * limits.OCTET
    return y.new_empty(len(y), room)[:, :width]


def _parts(y: torch.Tensor, heads: Any, weights: Any, documents: Documents) -> list[_Part]:
    """Return the key heads that go at a time, as equal as can be."""
    octets = limits.OCTET
    if y.stride(1) != 1 or y.stride(0) % octets or y.data_ptr() % limits.ALIGNMENT:
        y = _rows_on_octets(y).copy_(y)
    count = -(-heads.groups // max(1, MOST_ROWS // (len(y) * heads.repeats)))
    edges = [heads.groups * i // count for i in range(count + 1)]
    return [_Part(y, heads, weights, documents, *edges[i : i + 2]) for i in range(count)]


class _Made(NamedTuple):
    """What forward makes on the way to its outputs, and backward again.

    qkv  [F, channels of the part] behind the convolution
    changes [F, H, V], reads W [F, H, K], states [N, H, K, V] and the others: see megalora.ops.delta_kernels
    """

    qkv: torch.Tensor
    changes: torch.Tensor
    reads: torch.Tensor
    inverse: torch.Tensor | None
    sums: torch.Tensor
    betas: torch.Tensor
    norms: torch.Tensor
    states: torch.Tensor


class _Part:
    """The key heads from `first` to before `stop`, with the value heads that read them."""

    def __init__(self, y: torch.Tensor, heads: Any, weights: Any, documents: Documents, first: int, stop: int):
        self.y, self.weights, self.documents = y, weights, documents
        self.tokens, self.repeats, self.key, self.value = len(y), heads.repeats, heads.key, heads.value
        self.groups, self.count = stop - first, (stop - first) * heads.repeats
        self.first = first * heads.repeats
        self.shape = {"REPEATS": heads.repeats, "K": heads.key, "V": heads.value, "C": CHUNK}
        key, values = self.groups * heads.key, self.count * heads.value
        self.widths = [key, key, values]
        each = [width // heads.groups for width in heads.widths]
        starts = [sum(heads.widths[:i]) + first * each[i] for i in range(6)]
        self.columns = starts
        self.block = min(heads.key, heads.value, CHANNELS)
        self.channels = *(at // self.block for at in starts[:3]), key // self.block
        self.decay, self.bias = (x[self.first : self.first + self.count] for x in (weights.decay, weights.bias))

    def forward(self, out: torch.Tensor) -> None:
        """Write the results of the part's value heads to their columns of out [F, all H V]."""
        from megalora.ops import delta_kernels as kernels

        made = self._made(keep=False)
        q, k, _ = self._qkv(made.qkv)
        z = self._y(self.y, 3)
        own = out[:, self.first * self.value :]
        self._launch(
            "output", kernels.output_kernel, self._chunks(self.count), q, k, made.changes, made.sums, made.norms,
            made.states, self.documents.pieces, z, self.weights.norm, own, self.tokens, self.count,
            made.qkv.stride(0), _octets(self.y), out.stride(0), EPSILON, self.weights.eps,
        )  # fmt: skip

    def backward(self, grad: torch.Tensor, dy: torch.Tensor) -> None:
        """Write the gradients of the part's columns of y to those of dy, from grad [F, all H V]."""
        from megalora.ops import convolution_kernels
        from megalora.ops import delta_grad_kernels as kernels

        made = self._made(keep=True)
        q, k, _ = self._qkv(made.qkv)
        stride, octets, to = made.qkv.stride(0), _octets(self.y), _octets(dy)
        sizes = self.tokens, self.count, stride
        by_chunk, by_group = self._chunks(self.count), self._chunks(self.groups)
        pieces = self.documents.pieces
        do, of_changes = torch.empty_like(made.changes), torch.empty_like(made.changes)
        scales, of_sums = torch.empty_like(made.sums), torch.empty_like(made.sums)
        self._launch(
            "output_backward", kernels.output_backward_kernel, by_chunk, q, k, made.changes, made.sums, made.norms,
            made.states, pieces, self._y(self.y, 3), self.weights.norm, grad[:, self.first * self.value :], do,
            self._y(dy, 3), of_changes, scales, *sizes, octets, to, grad.stride(0), EPSILON, self.weights.eps,
        )  # fmt: skip
        dstates = torch.empty_like(made.states)
        self._launch(
            "scan_backward", kernels.scan_backward_kernel, self._scans(), q, k, made.reads, do, of_changes, made.sums,
            made.norms, scales, self.documents.spans, dstates, *sizes, BV=self._state_columns(),
        )  # fmt: skip
        made = made._replace(reads=None)
        dqkv = torch.empty_like(made.qkv)
        dq, dk, dv = self._qkv(dqkv)
        pairs, system = torch.empty_like(made.inverse), torch.empty_like(made.inverse)
        self._launch(
            "system_backward", kernels.system_backward_kernel, by_chunk, q, k, made.changes, made.inverse, made.sums,
            made.betas, made.norms, scales, do, of_changes, pieces, dv, self._y(dy, 4), pairs, system, of_sums, *sizes,
            to,
        )  # fmt: skip
        self._launch(
            "query_backward", kernels.query_backward_kernel, by_group, q, k, made.sums, scales, made.states, do, pairs,
            of_sums, pieces, dq, *sizes,
        )  # fmt: skip
        self._launch(
            "key_backward", kernels.key_backward_kernel, by_group, q, k, self._y(self.y, 5), self.decay, self.bias,
            made.changes, made.sums, made.betas, made.norms, made.states, dstates, of_changes, pairs, system, of_sums,
            pieces, dk, self._y(dy, 5), *sizes, octets, to,
        )  # fmt: skip
        self._convolve(
            "convolution_backward", convolution_kernels.convolution_backward_kernel,
            (self.y, self.weights.convolution, self.documents.ages, dqkv, dy, self.tokens, octets, to), stride,
        )  # fmt: skip

    def _made(self, keep: bool) -> _Made:
        """Compute what outputs are made of; keep: the inverse too."""
        from megalora.ops import convolution_kernels
        from megalora.ops import delta_kernels as kernels

        y, tokens, count = self.y, self.tokens, self.count
        qkv = y.new_empty(tokens, sum(self.widths))
        self._convolve(
            "convolution", convolution_kernels.convolution_kernel,
            (y, self.weights.convolution, self.documents.ages, qkv, tokens, _octets(y)), qkv.stride(0),
        )  # fmt: skip
        q, k, v = self._qkv(qkv)
        changes, reads = y.new_empty(tokens, count, self.value), y.new_empty(tokens, count, self.key)
        inverse = y.new_empty(tokens, count, CHUNK) if keep else None
        sums, betas, norms = (torch.empty(count, tokens, dtype=torch.float32, device=y.device) for _ in range(3))
        pieces = self.documents.pieces
        self._launch(
            "solve", kernels.solve_kernel, self._chunks(count), k, v, self._y(y, 4), self._y(y, 5), self.decay,
            self.bias, pieces, changes, reads, inverse, sums, betas, norms, tokens, count, qkv.stride(0), _octets(y),
            EPSILON, LEVELS=CHUNK.bit_length() - 1, PRECISION=precision(), KEEP=keep,
        )  # fmt: skip
        states = y.new_empty(len(pieces), count, self.key, self.value)
        self._launch(
            "scan", kernels.scan_kernel, self._scans(), k, reads, changes, sums, norms, self.documents.spans, states,
            tokens, count, qkv.stride(0), BV=self._state_columns(),
        )  # fmt: skip
        return _Made(qkv, changes, reads, inverse, sums, betas, norms, states)

    def _qkv(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return qkv.split(self.widths, 1)

    def _y(self, y: torch.Tensor, number: int) -> torch.Tensor:
        """Return y from where the part's columns of z, b or a (3, 4, 5) begin."""
        return y[:, self.columns[number] :]

    def _chunks(self, heads: int) -> tuple[int, int]:
        return len(self.documents.pieces), heads

    def _state_columns(self) -> int:
        return min(self.value, STATE_COLUMNS)

    def _scans(self) -> tuple[int, int]:
        return len(self.documents.spans) * (self.value // self._state_columns()), self.count

    def _launch(self, name: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, **more: Any) -> None:
        warps, stages = LAUNCHES[name]
        kernel[grid](*arguments, **self.shape, **more, num_warps=warps, num_stages=stages)

    def _convolve(self, name: str, kernel: Any, arguments: tuple[Any, ...], stride: int) -> None:
        warps, stages = LAUNCHES[name]
        rows, weight = ROWS[name], self.weights.convolution
        kernel[-(-self.tokens // rows), stride // self.block](
            *arguments, *self.channels, stride, WIDTH=weight.shape[1], ROWS=rows, BLOCK=self.block,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _octets(y: torch.Tensor) -> int:
    """Return the stride of rows, in 8 elements."""
    return y.stride(0) // limits.OCTET
