"""What mixers with states share: linears that read one input, a core between them that knows documents, and one linear
behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from megalora.models.inputs import Inputs, States
from megalora.ops.delta_rule import Documents
from megalora.parallel.group import LinearGroup
from megalora.parallel.group_grad import apply_group


class RecurrentBlock(ABC):
    """A mixer that is a `models.inputs.Recurrent` in generation.

    layer   its number in the model
    inputs, output  the groups before and behind the core
    """

    layer: int
    inputs: LinearGroup
    output: LinearGroup

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return (self.inputs, self.output)

    @property
    def room(self) -> int:
        """Columns that are wanted behind the input."""
        return self.inputs.room

    def __call__(self, X: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Map X [T, hidden_size + room] to [T, hidden_size], or this rank's term [F, hidden_size] (see LinearGroup)."""
        y = apply_group(self.inputs, X, inputs.tokens)
        if inputs.cache is not None:
            result = inputs.cache.go_on(self.layer, y, self)
        else:
            documents = inputs.documents
            assert documents is not None and inputs.context is None
            result = inputs.attend(lambda y: self.mixed(y, documents), y)
        return apply_group(self.output, result, inputs.tokens)

    @abstractmethod
    def mixed(self, y: torch.Tensor, documents: Documents) -> torch.Tensor:
        """Return the core's results for y [F, O], whole documents."""

    # ---- generation

    @abstractmethod
    def nothing(self, count: int, like: torch.Tensor) -> States:
        """Return what `count` sequences without tokens leave; like: y."""

    @abstractmethod
    def continued(
        self, y: torch.Tensor, bounds: Sequence[int], documents: Documents, kept: States
    ) -> tuple[torch.Tensor, States]:
        """Return the results of y [F, O], the next tokens of several sequences, and what they leave."""

    @abstractmethod
    def step(self, y: torch.Tensor, kept: States, slots: torch.Tensor, idle: int | None) -> torch.Tensor:
        """Return the results of one token of each sequence and bring what their slots keep forward, in place."""

    @property
    @abstractmethod
    def steps_alike(self) -> bool:
        """Whether a CUDA graph can hold `step`."""
