"""Heads as data, and how the names in a model's files may differ from ours. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from megalora.models.linears import Linear
from megalora.models.mixers import Norm


@dataclass(frozen=True)
class Head:
    """Logits: softcap * tanh(s / softcap) of s = scale * (`{name}.weight` [vocab_size, width] project(hidden) + bias).

    tied     the weight is the embedding's, and not in the file
    bias     `{name}.bias` [vocab_size]
    project  from hidden_size to the words' width; frozen, and without an adapter
    softcap  None: logits are s
    bias_row  name of a bias [1, vocab_size] in full (BART), zero where the file has none; None: there is no such
    """

    name: str
    tied: bool = False
    bias: bool = False
    project: Linear | None = None
    scale: float = 1.0
    softcap: float | None = None
    bias_row: str | None = None

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def optional(self) -> frozenset[str]:
        """Tensors that a file may lack: they are zero then."""
        return frozenset() if self.bias_row is None else frozenset({self.bias_row})

    @property
    def names(self) -> tuple[str, ...]:
        """The modules of the file that it is made of."""
        return (self.name,) if self.project is None else (self.name, self.project.name)

    def tensors(self, vocab_size: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each tensor in the file."""
        if not self.tied:
            yield self.weight, (vocab_size, width)
        if self.bias:
            yield f"{self.name}.bias", (vocab_size,)
        if self.bias_row is not None:
            yield self.bias_row, (1, vocab_size)
        yield from () if self.project is None else self.project.tensors()


@dataclass(frozen=True)
class ClassHead:
    """Scores of classes: out(dropout(x)), or out(dropout(norm(act(dense(input_dropout(x)))))) where there is a dense.

    out      [classes, hidden_size], trained in full; its rows are set by `ModelSpec.for_task`
    labels   names of the classes, in the order of `out`'s rows
    dense    [hidden_size, hidden_size], of the whole model where it is frozen; trained in full where `trains_dense`
    dropout  probability of dropping a feature of what `out` reads; input_dropout: of what `dense` reads
    norm     behind act, frozen; None: nothing
    means    x is the mean over the document of a labelled token, not the token's own
    """

    out: Linear
    dropout: float = 0.0
    dense: Linear | None = None
    act: str = "tanh"
    input_dropout: float = 0.0
    trains_dense: bool = False
    norm: Norm | None = None
    means: bool = False
    labels: tuple[str, ...] = ()

    tied: ClassVar[bool] = False

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.out,) if self.dense is None else (self.dense, self.out)

    def tensors(self, vocab_size: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each tensor in the file."""
        for part in (*self.linears, *(() if self.norm is None else (self.norm,))):
            yield from part.tensors()

    @property
    def names(self) -> tuple[str, ...]:
        return (*(linear.name for linear in self.linears), *(() if self.norm is None else (self.norm.name,)))

    def trains(self, linear: Linear) -> bool:
        """Return whether one of its linears is trained."""
        return linear is self.out or self.trains_dense

    @property
    def trained(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor that is trained, with its shape; a file of the base model need not have it."""
        return {name: shape for linear in self.linears if self.trains(linear) for name, shape in linear.tensors()}


class TaskHead(NamedTuple):
    """The head that a model gets for a task: one of peft's task types."""

    task: str
    head: ClassHead


BUFFERS = ("rotary_emb.inv_freq",)  # that older versions of transformers saved


@dataclass(frozen=True)
class FileNames:
    """How the names of a file may differ from ours.

    renames  (start, ours) of other starts of names that files are known to have
    endings  (end, ours) of other ends of names, which early files have
    ignored  ends of names of tensors that say nothing: buffers that older versions saved
    prefix   of the bare model, which files saved from it lack
    passed   starts of names of parts that are no part of this model: layers that predict further tokens, heads of
             another task
    beside   starts of names of the rest of a larger model that this one is a part of (an image tower): not read, and
             copied to files that are made of these
    ahead    the same of layers that predict further tokens
    """

    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = BUFFERS
    prefix: str = ""
    passed: tuple[str, ...] = ()
    endings: tuple[tuple[str, str], ...] = ()
    beside: tuple[str, ...] = ()
    ahead: tuple[str, ...] = ()

    @property
    def carried(self) -> tuple[str, ...]:
        """Starts of names of what is not read, and goes into files that are made of these."""
        return self.beside + self.ahead

    def ours(self, name: str, expected: Collection[str]) -> str | None:
        """Return our name of a tensor of the file, None for one that says nothing. expected: all of our names."""
        for end, ours in self.endings:
            if name.endswith(end):
                name = name[: -len(end)] + ours
        if name in expected:
            return name
        if name.startswith(self.carried):
            return None
        for start, ours in self.renames:
            if name.startswith(start):
                renamed = ours + name[len(start) :]
                return None if renamed not in expected and renamed.startswith(self.passed) else renamed
        if self.prefix + name in expected:
            return self.prefix + name
        return None if name.endswith(self.ignored) or name.startswith(self.passed) else name
