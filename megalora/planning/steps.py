"""The residuals of a layer on one tensor-parallel rank, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from megalora.planning.groups import Group
from megalora.planning.mixers import Experts, Mixer, Norm, counted


@dataclass(frozen=True)
class Branch:
    """One mixer behind its norm.

    shares  the norm is that of a branch before it, and computed there
    scaled  the result, or the sum, is multiplied by a number
    totals  the sum with the residual stream is made, and multiplied by a number
    post_norm  of the sum with the residual stream
    drops      dropout of the base, of the result
    """

    mixer: Mixer
    norm: Norm | None
    output_norm: Norm | None = None
    shares: bool = False
    scaled: bool = False
    post_norm: Norm | None = None
    drops: bool = False
    totals: bool = False

    @property
    def reads_result(self) -> bool:
        """Whether backward needs the mixer's result (see megalora.models.recompute)."""
        return self.output_norm is not None or self.post_norm is not None or self.drops

    @property
    def elements(self) -> int:
        """Elements of its norms, the mixer's included."""
        before = 0 if self.norm is None or self.shares else self.norm.elements
        behind = sum(norm.elements for norm in (self.output_norm, self.post_norm) if norm is not None)
        return before + behind + self.mixer.norms + self.totals


@dataclass(frozen=True)
class Step:
    """A residual: one branch, or several that run beside each other on the same stream.

    output_norm, totals  of several, as a branch has them
    """

    branches: tuple[Branch, ...]
    output_norm: Norm | None = None
    totals: bool = False

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        return tuple(branch.mixer for branch in self.branches)

    @property
    def elements(self) -> int:
        """Elements of its norms, the mixers' included."""
        own = 0 if self.output_norm is None else self.output_norm.elements
        return sum(branch.elements for branch in self.branches) + own + self.totals

    @property
    def leaves_one(self) -> bool:
        """Whether what it leaves is in one piece, made of the sum, and not two that are yet to be added."""
        return self.totals or any(branch.post_norm is not None or branch.totals for branch in self.branches)


@dataclass(frozen=True)
class Layer:
    """One layer: its residuals in order of computation."""

    steps: tuple[Step, ...]
    hidden: int

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        return tuple(mixer for step in self.steps for mixer in step.mixers)

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(group for mixer in self.mixers for group in mixer.groups)

    @property
    def counted(self) -> tuple[tuple[int, Group], ...]:
        """Every group, and how many of it the rank holds."""
        return tuple(pair for mixer in self.mixers for pair in counted(mixer))

    @property
    def frozen(self) -> int:
        """Elements of all that is frozen: linears and norms."""
        norms = sum(step.elements for step in self.steps)
        return sum(times * group.frozen for times, group in self.counted) + norms

    @property
    def trained(self) -> int:
        spared = sum(mixer.spared for mixer in self.mixers if isinstance(mixer, Experts))
        return sum(times * group.trained for times, group in self.counted) - spared

    @property
    def copies(self) -> int:
        return sum(times * group.copies for times, group in self.counted)

    @property
    def trains(self) -> bool:
        return any(group.trains for group in self.groups)

    @property
    def leaves_one(self) -> bool:
        return self.steps[-1].leaves_one
