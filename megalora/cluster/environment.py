"""What a launcher (torchrun, Slurm) sets in the environment. No torch."""

from __future__ import annotations

import os

from megalora.errors import UserError

LISTENS = "MEGALORA_STORE_FD"
"""Set for rank 0 by `megalora --nproc`: the descriptor of the socket on which the ranks' store is to listen."""
NPROC = "MEGALORA_NPROC"
"""Set for the ranks that `megalora --nproc` has started: their number."""
_TASKS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun", "SLURM_STEP_NUM_TASKS": "srun"}


def check_launcher() -> None:
    """Raise UserError where mpirun or srun has started several processes, none of which knows of the others."""
    for name, launcher in _TASKS.items():
        tasks = os.environ.get(name, "1")
        if "RANK" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
            raise UserError(
                f"{launcher} has started {tasks} processes ({name}), but megalora takes its ranks from torchrun "
                f"(RANK, WORLD_SIZE), so each would run alone",
                "on one host start one process and give --nproc; on several use torchrun (on Slurm: "
                "scripts/slurm/run.sh)",
            )


def environment_int(name: str, default: int) -> int:
    """Return an integer that torchrun sets, e.g. WORLD_SIZE. Raises UserError where it is something else."""
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise UserError(f"environment variable {name} = {value!r} is not an integer", "start with torchrun") from None
