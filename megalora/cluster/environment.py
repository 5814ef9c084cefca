"""What a launcher (torchrun, Slurm) sets in the environment. No torch."""

from __future__ import annotations

import os

from megalora.errors import UserError


def environment_int(name: str, default: int) -> int:
    """Return an integer that torchrun sets, e.g. WORLD_SIZE. Raises UserError where it is something else."""
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise UserError(f"environment variable {name} = {value!r} is not an integer", "start with torchrun") from None
