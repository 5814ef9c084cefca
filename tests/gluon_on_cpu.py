"""Gluon on a CPU, as much of it as megalora.ops.grouped_hopper uses: the partitions of a program are threads.

A product is computed when it is waited for, as late as a GPU may compute it, so that a buffer given back too early
shows in the result; a barrier that nobody completes fails the run instead of stopping it.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from unittest import mock

import torch
from waiting import PATIENCE


class Pointer:
    def __init__(self, flat, offset=0):
        self.flat, self.offset = flat, offset
        self.dtype = types.SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, offset):
        return Pointer(self.flat, self.offset + offset)

    def __sub__(self, offset):
        return self + -offset


class Descriptor:
    """A tensor, and the block that one copy takes from it: zeros where the block reaches out of the tensor."""

    def __init__(self, base, block):
        self.base, self.block = base, block

    def read(self, at):
        made = torch.zeros(self.block, dtype=self.base.dtype)
        assert all(first >= 0 for first in at)
        spans = [max(0, min(size, n - i)) for i, size, n in zip(at, self.block, self.base.shape, strict=True)]
        source = self.base[tuple(slice(i, i + n) for i, n in zip(at, spans, strict=True))]
        made[tuple(slice(n) for n in spans)] = source
        return made


class Barrier:
    def __init__(self):
        self.lock, self.phase = threading.Condition(), 0

    def begin(self, count):
        self.count = self.left = count
        self.bytes = 0

    def change(self, arrivals, size):
        with self.lock:
            self.left, self.bytes = self.left - arrivals, self.bytes + size
            assert self.left >= 0, "more arrivals than the barrier counts"
            if self.left == self.bytes == 0:
                self.phase, self.left = self.phase + 1, self.count
                self.lock.notify_all()

    def wait(self, parity):
        with self.lock:
            assert self.lock.wait_for(lambda: self.phase % 2 != parity, PATIENCE), "nobody completes this barrier"


class Shared:
    """A view of shared memory."""

    def __init__(self, held):
        self.held = held

    def index(self, i):
        return self.held[i] if isinstance(self.held, list) else Shared(self.held[i])

    def slice(self, start, length, dim=0):
        return Shared(self.held.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.held.permute(order))

    def store(self, value):
        self.held.copy_(value)

    def load(self, _layout):
        return self.held.clone()


class Total:
    """An accumulator: its products are added when they are waited for."""

    def __init__(self, shape):
        self.value = torch.zeros(shape, dtype=torch.float64)

    def to(self, dtype):
        return self.value.to(dtype)


class Machine:
    """The memory and the partitions of one program; `gl` and what else the kernels import are made of its methods."""

    def __init__(self, program, programs):
        self.program, self.programs, self.lock, self.here = program, programs, threading.Lock(), threading.local()

    def specialise(self, functions, warps, _registers):
        failures = []

        def run(function, arguments, count):
            self.here.warps, self.here.products = count, []
            try:
                function(*arguments)
            except BaseException as error:  # noqa: BLE001 (raised again below)
                failures.append(error)

        threads = [
            threading.Thread(target=run, args=(*one, count))
            for one, count in zip(functions, [4, *warps], strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def multiply(self, a, b, total, is_async):
        assert is_async
        self.here.products.append((a, b, total))
        return total

    def products_wait(self, outstanding, totals):
        products = self.here.products
        while len(products) > outstanding:
            a, b, total = products.pop(0)
            total.value += a.held.double() @ b.held.double()
        return totals if len(totals) > 1 else totals[0]

    def atomic_add(self, pointer, value):
        with self.lock:
            before = pointer.flat[pointer.offset].item()
            pointer.flat[pointer.offset] += value
        return before

    def copy(self, descriptor, at, barrier, shared):
        made = descriptor.read(at)
        shared.held.copy_(made.view(shared.held.shape))
        barrier.change(0, -2 * made.numel())  # as if of 16 bits

    def modules(self):
        """Return the modules that the kernels import, by name."""
        gl = types.SimpleNamespace(
            constexpr=lambda value: value, int32=torch.int32, int64=torch.int64, float32=torch.float32,
            bfloat16=torch.bfloat16, where=where, cdiv=lambda a, b: -(-a // b),
            arange=lambda first, stop, _layout: torch.arange(first, stop),
            sum=lambda values, _dim: values.sum().item(), max=lambda values, _dim: values.max().item(),
            associative_scan=lambda values, dim, _add: values.cumsum(dim),
            convert_layout=lambda values, _layout: values,
            zeros=lambda shape, _dtype, _layout: Total(shape), load=load, store=store, atomic_add=self.atomic_add,
            num_warps=lambda: self.here.warps, program_id=lambda _axis: self.program,
            num_programs=lambda _axis: self.programs, thread_barrier=lambda: None, static_range=range,
            allocate_shared_memory=allocate, warp_specialize=self.specialise,
            **dict.fromkeys(
                ["BlockedLayout", "SliceLayout", "DistributedLinearLayout", "NVMMADistributedLayout",
                 "NVMMASharedLayout", "SwizzledSharedLayout"], lambda *_, **__: None,
            ),
        )  # fmt: skip
        hopper = types.SimpleNamespace(
            mbarrier=types.SimpleNamespace(
                MBarrierLayout=lambda: None, init=lambda barrier, count: barrier.begin(count),
                wait=lambda barrier, parity: barrier.wait(parity),
                arrive=lambda barrier, count, pred=True: barrier.change(count, 0) if pred else None,
                expect=lambda barrier, size, pred=True: barrier.change(1, size) if pred else None,
            ),
            tma=types.SimpleNamespace(async_copy_global_to_shared=self.copy),
            warpgroup_mma=self.multiply, warpgroup_mma_wait=self.products_wait,
        )  # fmt: skip
        gluon = types.SimpleNamespace(jit=lambda function: function, language=gl)
        names = {"": types.SimpleNamespace(), ".experimental": types.SimpleNamespace(gluon=gluon)}
        names |= {".experimental.gluon": gluon, ".experimental.gluon.language": gl}
        names |= {".experimental.gluon.language.nvidia": types.SimpleNamespace(hopper=hopper)}
        names |= {".experimental.gluon.language.nvidia.hopper": hopper}
        return {f"triton{name}": module for name, module in names.items()}


def where(condition, one, other):
    made = torch.where(torch.as_tensor(condition), torch.as_tensor(one), torch.as_tensor(other))
    return made if made.ndim else made.item()


def load(pointer, mask=None, other=0):
    offset = torch.as_tensor(pointer.offset)
    mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    found = torch.where(mask, pointer.flat[torch.where(mask, offset, 0)], other)
    return found if found.ndim else found.item()


def store(pointer, values, mask):
    pointer.flat[pointer.offset[mask]] = values[mask]


def allocate(dtype, shape, _layout):
    if dtype == torch.int64:
        return Shared([Barrier() for _ in range(shape[0])])
    return Shared(torch.zeros(shape, dtype=dtype) if dtype == torch.int32 else torch.full(shape, float("nan")))


def emulated(module, program, programs):
    """Return the module `module` of kernels, imported anew so that its functions run as program `program` here."""
    with mock.patch.dict(sys.modules, Machine(program, programs).modules()):
        sys.modules.pop(module, None)
        made = importlib.import_module(module)
        sys.modules.pop(module)
    return made
