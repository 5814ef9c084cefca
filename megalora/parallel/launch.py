"""From torchrun's environment to a process group, a device and a mesh."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megalora.errors import UserError
from megalora.parallel.mesh import Clock, ParallelMesh, build_mesh, layout

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective: longer than the slowest start-up phase of one rank


def environment_int(name: str, default: int) -> int:
    """An integer that torchrun sets, e.g. WORLD_SIZE. Raises UserError where it is something else."""
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise UserError(f"environment variable {name} = {value!r}: must be an integer; start with torchrun") from None


def choose_device() -> tuple[torch.device, str | None]:
    """(this rank's device, a remark for the user or None): GPU LOCAL_RANK where each local rank has one, else CPU."""
    local_rank, local_size = environment_int("LOCAL_RANK", 0), environment_int("LOCAL_WORLD_SIZE", 1)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus >= local_size:
        return torch.device("cuda", local_rank), None
    remark = f"{local_size} processes, but {gpus} GPU{'s' * (gpus > 1)}: running on the CPU" if gpus else None
    return torch.device("cpu"), remark


def fix_order_of_sums(device: torch.device) -> None:
    """Makes torch sum in a fixed order on a GPU, wherever it has the choice (attention's backward pass, cuBLAS).

    To be called before the GPU is used. Raises UserError on a CPU, where the order is fixed anyhow.
    """
    if device.type != "cuda":
        raise UserError("deterministic = true changes nothing on a CPU, where repeats are equal anyhow: leave it out")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every kernel here writes what is read


@contextlib.contextmanager
def distributed(device: torch.device, tp: int, pp: int, clock: Clock | None = None) -> Iterator[ParallelMesh]:
    """The mesh of this process, with torch.distributed up while inside (gloo on CPU, NCCL between GPUs).

    Raises UserError on every rank, before any message, where the sizes do not fit the world.
    """
    rank, world_size = environment_int("RANK", 0), environment_int("WORLD_SIZE", 1)
    layout(world_size, tp, pp)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield build_mesh(rank, world_size, tp, pp, clock)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
    try:
        yield build_mesh(rank, world_size, tp, pp, clock)
        dist.barrier()  # no rank closes its connections while another still reads from them
    finally:
        dist.destroy_process_group()
