"""Memory that the GPUs of one host write to in one another: the link of an Exchange, and who has one."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import socket
import sys
from collections.abc import Iterator

import torch

from megalora.errors import UserError
from megalora.parallel.collectives import gather_objects
from megalora.parallel.exchange import Exchange
from megalora.parallel.mesh import Axis, ParallelMesh

_LONGEST_MAPPING = 120  # seconds, after which a rank that still maps says where it stands and ends


class PeerMemory:
    """The link of GPUs of one host that reach each other's memory: torch's symmetric memory, `nbytes` of each GPU.

    `map` comes before the first use. Raises torch.OutOfMemoryError or RuntimeError without room.
    """

    def __init__(self, axis: Axis, device: torch.device, nbytes: int):
        # Not used here, and its set-up does not come back on hosts that do not let a container have it.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        from torch.distributed import _symmetric_memory as symmetric

        self._axis, self._device, self._nbytes = axis, device, nbytes
        self._own = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        self._side = torch.cuda.Stream(device)

    def map(self) -> None:
        """Map the memory of all ranks. Collective over the axis. Raises RuntimeError where it cannot be mapped."""
        from torch.distributed import _symmetric_memory as symmetric

        # A rank whose neighbour fails waits inside of torch with the interpreter's lock, so no thread could see it.
        faulthandler.dump_traceback_later(_LONGEST_MAPPING, exit=True, file=sys.__stderr__)
        try:
            self._handle = symmetric.rendezvous(self._own, self._axis.group.group_name)
        finally:
            faulthandler.cancel_dump_traceback_later()
        ranks = range(self._axis.size)
        self._ranks = [self._handle.get_buffer(rank, (self._nbytes,), torch.uint8) for rank in ranks]

    def memory(self, nbytes: int) -> list[torch.Tensor]:
        assert nbytes <= self._nbytes, (nbytes, self._nbytes)
        return [memory[:nbytes] for memory in self._ranks]

    def meet(self) -> None:
        self._handle.barrier()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._side)


def choose_exchange(
    wanted: bool | None, mesh: ParallelMesh, sequence_parallel: bool, device: torch.device, nbytes: int
) -> tuple[Exchange | None, str | None]:
    """Return (the exchange of this rank's tensor-parallel axis or None, a line that says why GPUs have none).

    wanted  None: wherever it serves; all ranks of the mesh have one, or none has
    nbytes  of the largest activation that is gathered or scattered, with room for z
    Collective over the mesh. Raises UserError on every rank where it is wanted and cannot be.
    """
    axis, obstacle = mesh.tp, _obstacle(mesh.tp, sequence_parallel, device)
    link = None
    if obstacle is None and wanted is not False:
        obstacle = _first(_unreachable(axis, device, wanted is True), mesh.world)
        if obstacle is None:
            try:
                link = PeerMemory(axis, device, nbytes)
            except (ImportError, RuntimeError) as error:
                obstacle = f"{nbytes / 2**20:.0f} MiB that GPUs share could not be had ({_line(error)})"
            obstacle = _first(obstacle, mesh.world)
        if obstacle is None:
            try:
                link.map()
            except RuntimeError as error:
                obstacle = f"the GPUs could not map each other's memory ({_line(error)})"
            obstacle = _first(obstacle, mesh.world)
    if wanted and obstacle:
        raise UserError(f"tp_comm_overlap = true, but {obstacle}", "leave the flag out")
    if obstacle or wanted is False:
        worth_saying = device.type == "cuda" and axis.size > 1
        return None, f"tensor-parallel messages wait: {obstacle or 'as asked'}" if worth_saying else None
    return Exchange(axis, link), None


def _first(obstacle: str | None, world: Axis) -> str | None:
    """Return the first of all ranks' obstacles. Collective."""
    return next((found for found in gather_objects(obstacle, world) if found is not None), None)


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _obstacle(axis: Axis, sequence_parallel: bool, device: torch.device) -> str | None:
    """Return why no rank can have an exchange, whatever the hosts."""
    if axis.size == 1:
        return "tensor_parallel_size is 1"
    if not sequence_parallel:
        return "without --sequence_parallel true they reduce whole activations"
    return "there is no GPU" if device.type != "cuda" else None


def _unreachable(axis: Axis, device: torch.device, asked: bool) -> str | None:
    """Return why this rank cannot have one. asked: it is enough that the GPUs say they reach each other. Collective."""
    folder = next((os.environ[name] for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR") if name in os.environ), "/tmp")
    said = gather_objects((socket.gethostname(), device.index, folder), axis)
    places = [(host, index) for host, index, _ in said]
    if len({host for host, _ in places}) > 1:
        return f"the GPUs of ranks {axis.ranks[0]} to {axis.ranks[-1]} are in several hosts"
    if len(set(places)) < len(places):
        return "each rank sees its own GPU alone (CUDA_VISIBLE_DEVICES)"
    if os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        return f"NCCL_P2P_DISABLE = {os.environ['NCCL_P2P_DISABLE']} says that GPUs do not reach each other's memory"
    if os.environ.get("TORCH_SYMMMEM", "CUDA").upper() != "CUDA":
        return f"TORCH_SYMMMEM = {os.environ['TORCH_SYMMMEM']} takes other barriers than these"
    # torch hands the memory over by sockets in that folder, whose names have 107 characters at most.
    if len({folder for _, _, folder in said}) > 1 or len(folder) > 80:
        return f"TMPDIR ({folder}) is longer than 80 characters, or another on the other ranks"
    for other in [index for _, index in places if index != device.index]:
        if not torch.cuda.can_device_access_peer(device, other):
            return f"GPU {device.index} does not reach the memory of GPU {other}"
        if not (asked or _has_atomics(device.index, other)):
            blame = f"the driver says that atomics of GPU {device.index} do not work in the memory of GPU {other}"
            return f"{blame} (--tp_comm_overlap true tries it all the same)"
    return None


# CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED, and since CUDA 13 ..._ONLY_PARTIAL_NATIVE_ATOMIC_SUPPORTED: the one
# that barriers need, compare and swap, is among those that PCIe has.
_NATIVE_ATOMICS = 3, 5


def _has_atomics(device: int, other: int) -> bool:
    """Return whether a GPU's atomics work in the other's memory: over NVLink they do, over PCIe not always."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    found = ctypes.c_int(0)
    for attribute in _NATIVE_ATOMICS:
        status = driver.cuDeviceGetP2PAttribute(ctypes.byref(found), attribute, device, other)
        if status == 0 and found.value == 1:
            return True
    return False
