"""What base weights are read from: files, or what is made of others as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from megalora.ops.fp8 import Fp8Weight
from megalora.ops.nf4 import Nf4Weight


class BaseWeights(Protocol):
    """A place that base weights are read from."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...  # of each whole tensor

    def where(self, name: str) -> str: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None: ...

    def stored(self, name: str) -> Nf4Weight | Fp8Weight | None: ...  # as it is on disk, where that is quantised
