"""What a process may take of its GPU's and of its host's memory."""

from __future__ import annotations

from pathlib import Path

import torch

from megalora.cluster.environment import environment_int
from megalora.planning.fitting import Budget

RESERVE = 3 << 30  # bytes of a GPU that are left for libraries, NCCL's buffers and the allocator's fragments
_LIMITS = (  # files of control groups, version 2 and 1: (limit, use)
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
_HOST_SHARE = 0.7  # of the free memory of a host: the rest is for rows, checkpoints and other processes


def free_memory(device: torch.device, most: int | None = None) -> Budget:
    """Return what this process may take of its GPU (at most `most` bytes), and its share of the host's free memory."""
    free, total = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device) - RESERVE
    processes = max(1, environment_int("LOCAL_WORLD_SIZE", 1))
    host = int(_HOST_SHARE * host_memory()) // processes
    return Budget(min(usable, total if most is None else most), host)


def host_memory(root: Path = Path("/")) -> int:
    """Return the bytes of host memory that are free, within what the control group of this process allows; 0 where
    this cannot be read. root: where proc and sys are."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0
    group = root / "sys/fs/cgroup"
    for most, used in _LIMITS:
        try:
            limit, taken = ((group / name).read_text(encoding="ascii").strip() for name in (most, used))
            free = min(free, int(limit) - int(taken))
        except (OSError, ValueError):  # no limit, or no such file
            continue
    return max(0, free)
