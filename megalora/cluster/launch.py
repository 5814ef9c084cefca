"""From torchrun's environment to a process group, a device and a mesh."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megalora.cluster.environment import LISTENS, environment_int
from megalora.cluster.watch import Watch
from megalora.errors import Preempted, UserError
from megalora.parallel.mesh import ParallelMesh, build_mesh, layout

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective: longer than the slowest start-up phase of one rank


def choose_device() -> tuple[torch.device, str | None]:
    """Return (this rank's device, a remark for the user or None): GPU LOCAL_RANK where each local rank has one, else
    CPU.
    """
    local_rank, local_size = environment_int("LOCAL_RANK", 0), environment_int("LOCAL_WORLD_SIZE", 1)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus >= local_size:
        return torch.device("cuda", local_rank), None
    remark = f"{local_size} processes, but {gpus} GPU{'s' * (gpus > 1)}: running on the CPU" if gpus else None
    return torch.device("cpu"), remark


def fix_order_of_sums(device: torch.device) -> None:
    """Make torch sum in a fixed order on a GPU, wherever it has the choice (attention's backward pass, cuBLAS).

    To be called before the GPU is used. Raises UserError on a CPU, where the order is fixed anyhow.
    """
    if device.type != "cuda":
        raise UserError("deterministic = true changes nothing on a CPU, where repeats are equal anyhow", "leave it out")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it
    torch.use_deterministic_algorithms(True)
    # Every kernel here writes what is read. The flag is a property of the module's class, which its types do not show.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def restarts() -> int:
    """Return how often this run has been started again by torchrun or by Slurm, unattended."""
    return environment_int("TORCHELASTIC_RESTART_COUNT", 0) + environment_int("SLURM_RESTART_COUNT", 0)


def open_store(rank: int, world_size: int) -> dist.Store:
    """Return a part of the store at MASTER_ADDR:MASTER_PORT, which torchrun or rank 0 serves, for this start of the
    run.
    """
    if LISTENS in os.environ:  # of `megalora --nproc`: not on all interfaces
        port, listens = environment_int("MASTER_PORT", 0), environment_int(LISTENS, -1)
        store: dist.Store = dist.TCPStore(
            "127.0.0.1", port, world_size, True, TIMEOUT, wait_for_workers=False, master_listen_fd=listens
        )
    else:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=TIMEOUT))
    return dist.PrefixStore(agree_on_name(store, rank, world_size), store)


def agree_on_name(store: dist.Store, rank: int, world_size: int) -> str:
    """Return a name that all ranks know and no earlier start of the run has used. Collective.

    torchrun (of torch 2.13) serves one store to all its restarts, and neither their number nor anything else that it
    gives its ranks is the same on all nodes: what lies in the store may be of ranks that have died. So each rank asks
    under a name of its own, and the first answers whoever asks until all have said that they heard it.
    """
    mine = uuid.uuid4().hex
    if rank != 0:
        store.set(f"megalora/asks/{rank}", mine)
        name = store.get(f"megalora/answer/{mine}").decode()
        store.set(f"{name}/heard/{rank}", "")
        return name
    missing, deadline = set(range(1, world_size)), time.monotonic() + TIMEOUT.total_seconds()
    answered: dict[int, str] = {}
    while missing:
        for other in [*missing]:
            if store.check([f"{mine}/heard/{other}"]):
                missing.discard(other)
            elif store.check([f"megalora/asks/{other}"]):
                asked = store.get(f"megalora/asks/{other}").decode()
                if answered.get(other) != asked:
                    store.set(f"megalora/answer/{asked}", mine)
                    answered[other] = asked
        if time.monotonic() > deadline:
            late = ", ".join(map(str, sorted(missing)))
            raise UserError(f"ranks {late} have not come within {TIMEOUT}", "look at the nodes that they run on")
        time.sleep(0.01 if missing else 0)
    return mine


def tp_crossing(world_size: int, tp: int, pp: int, hosts: Sequence[str], megabytes: float) -> str | None:
    """Return a warning where tensor parallelism leaves a host, or None.

    hosts      by rank
    megabytes  that a rank's layer reduces in a microbatch, forward and backward
    """
    apart = [ranks for ranks in layout(world_size, tp, pp)["tp"] if len({hosts[rank] for rank in ranks}) > 1]
    if not apart:
        return None
    most, between = max(hosts.count(host) for host in hosts), " and ".join(dict.fromkeys(hosts[r] for r in apart[0]))
    return (
        f"tensor parallelism crosses hosts ({between}): every layer of every microbatch reduces {megabytes:.1f} MB "
        f"over the network, and waits for it; a tensor_parallel_size that divides a host's {most} ranks stays inside"
    )


@contextlib.contextmanager
def distributed(
    device: torch.device,
    tp: int,
    pp: int,
    watch: Watch | None = None,
    patience: datetime.timedelta | None = None,
    cp: int = 1,
) -> Iterator[ParallelMesh]:
    """Give the mesh of this process, with torch.distributed up while inside (gloo on CPU, NCCL between GPUs).

    watch     watches over the ranks while inside, and is the clock of the mesh; default: one that looks for dead ranks
    patience  how long a rank waits in a collective for the others; None: TIMEOUT
    Raises UserError on every rank, before any message, where the sizes do not fit the world; RankLost where another
    rank has died.
    """
    rank, world_size = environment_int("RANK", 0), environment_int("WORLD_SIZE", 1)
    layout(world_size, tp, pp, cp)
    watch = watch or Watch()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = None
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        store = open_store(rank, world_size)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=patience or TIMEOUT, device_id=device_id
        )
    in_order = False
    try:
        mesh = build_mesh(rank, world_size, tp, pp, watch, patience, cp)
        own_store: Any = store  # torch's types lack clone()
        watch.begin(None if store is None else own_store.clone(), mesh.world)
        with watch:
            yield mesh
            watch.done()
            if world_size > 1:
                dist.barrier()  # no rank closes its connections while another still reads from them
        in_order = True
    except (UserError, Preempted):
        in_order = True  # all ranks leave
        raise
    finally:
        watch.end(in_order)
        if world_size > 1 and in_order:  # with a rank lost it may wait for that rank
            dist.destroy_process_group()
