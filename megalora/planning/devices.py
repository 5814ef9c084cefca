"""Speeds of the devices that a plan reckons with: the one place for such figures.

Sustained ones, as training steps reach them, not those of a data sheet. H100: fitted by hand to steps of Llama-8B's
shape on several H100s of 80 GB and, for the host, to a slice of Llama-70B without CUDA graphs (both in
benchmarks/LOG.md), attention in long documents to steps of one row of 8,192 to 393,216 tokens on an H200; e4m3 as
sustained with the other factor quantised before each product; what a kernel takes beside its bytes, fitted to a rank's
slice of DeepSeek-R1 and to layers of Qwen3-30B-A3B on an H200, and to one row of Llama-8B. H200: the same chip, its
memory by the data sheet's 4.8 TB/s in the H100's proportion. A100: the data sheet's 312 TFLOP/s and 2.04 TB/s in about
the H100's proportions, FlashAttention-2 as published (arXiv 2307.08691). Links: of H100s as measured, 34 MB by copy
engines in 90 us and by NCCL in 170 us; of A100s in the proportion of NVLink 3 to 4; networks one adapter of 400 or 200
Gb/s a GPU, at 80%. CPU: two threads of a shared EPYC host. Waiting for the slowest rank: fitted to tensor parallel 2
with 2048 and 8192 tokens on H100s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the table of devices is read by `--help`, which does not wait for torch
    import torch


@dataclass(frozen=True)
class Device:
    """One kind of device and its links. All per second.

    gemm, gemm32   FLOPs of matrix products in 16-bit and in 32-bit floats
    gemm8          FLOPs of matrix products in e4m3; 0: they are done in 16 bits
    attention      FLOPs of attention, forward and backward
    long, ramp     FLOPs of it in long documents, where each token takes as long as `ramp` keys more than it sees; 0: as
                   `attention`
    memory         bytes read or written
    link, network  bytes to a neighbour in the node, by copies, and in another, one direction
    collective     bytes to a neighbour in the node by NCCL, one direction
    latency        seconds of one message or collective, beside its bytes
    meeting        part that tensor parallel adds to compute, beside messages: at each a rank waits for the slowest
    call           seconds in which the host issues one operation: what small microbatches are bound by
    capacity       GiB of memory
    overlaps       whether messages of sequence parallelism run beside products
    kernel         seconds that an operation takes on the device beside its FLOPs and bytes: start and end of a kernel
    context        bytes to a neighbour of the context-parallel axis, as `collective`; 0: as that
    """

    name: str
    gemm: float
    gemm32: float
    gemm8: float
    attention: float
    memory: float
    link: float
    network: float
    collective: float
    latency: float
    meeting: float
    call: float
    capacity: float
    overlaps: bool
    context: float = 0.0
    long: float = 0.0
    ramp: float = 0.0
    kernel: float = 0.0

    def attention_seconds(self, flops: float, attended: float) -> float:
        """Return the seconds of attention, forward or backward; attended: its FLOPs if each token saw one key."""
        short = flops / self.attention
        return min(short, (flops + self.ramp * attended) / self.long) if self.long else short

    @property
    def merges(self) -> bool:
        """Return whether long documents go to cuDNN call by call there (see Workload)."""
        return self.long > 0

    def with_graphs(self) -> Device:
        """Return the same device where a step is replayed from CUDA graphs: the host issues next to nothing."""
        return replace(self, call=0.0)

    def across_nodes(self) -> Device:
        """Return the same device whose tensor-parallel neighbours are in other nodes."""
        return replace(self, link=self.network, collective=self.network, overlaps=False)

    def scaled(self, factor: float) -> Device:
        """Return the same device with all compute `factor` times as slow."""
        return replace(
            self,
            gemm=self.gemm / factor,
            gemm32=self.gemm32 / factor,
            gemm8=self.gemm8 / factor,
            attention=self.attention / factor,
            long=self.long / factor,
            memory=self.memory / factor,
            call=self.call * factor,
            kernel=self.kernel * factor,
        )


_hopper = partial(Device, long=490e12, ramp=470, kernel=4e-6)
DEVICES = {
    device.name: device
    for device in (
        _hopper("h100", 700e12, 50e12, 1250e12, 335e12, 2.45e12, 370e9, 40e9, 200e9, 15e-6, 0.07, 60e-6, 80, True),
        _hopper("h200", 700e12, 50e12, 1250e12, 335e12, 3.5e12, 370e9, 40e9, 200e9, 15e-6, 0.07, 60e-6, 141, True),
        Device("a100", 250e12, 17e12, 0, 180e12, 1.4e12, 240e9, 20e9, 130e9, 15e-6, 0.07, 60e-6, 80, True, kernel=4e-6),
        Device("cpu", 0.15e12, 0.15e12, 0, 0.05e12, 10e9, 2e9, 1e9, 2e9, 100e-6, 0.0, 10e-6, 16, False),
    )
}


def device_of(device: torch.device) -> Device:
    """Return the entry of a device at hand; a GPU that the table does not know counts as the first one."""
    if device.type != "cuda":
        return DEVICES["cpu"]
    import torch

    name = torch.cuda.get_device_name(device).lower()
    return next((entry for key, entry in DEVICES.items() if key in name), DEVICES["h100"])
