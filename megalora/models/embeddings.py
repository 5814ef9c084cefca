"""What enters the first layer, as data. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megalora.models.linears import Linear
from megalora.models.mixers import Norm


@dataclass(frozen=True)
class Positions:
    """Positions: `{name}.weight` [rows, hidden_size]; position p has row p + offset.

    waves    [hidden_size / 2]: row r is not in the file but the sines, then the cosines, of r * waves; None: learned
    precise  these angles are computed in float64, else in float32
    """

    name: str
    rows: int
    offset: int = 0
    waves: tuple[float, ...] | None = None
    precise: bool = False

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"


@dataclass(frozen=True)
class Boxes:
    """Learned places on a page (layoutlm): tables [rows, hidden_size] of the coordinates of a token's box, the column
    boxes of (left, top, right, bottom), and of its height and width."""

    prefix: str
    rows: int

    @property
    def names(self) -> tuple[str, ...]:
        """The tables, `{name}.weight` each: of left and right, of top and bottom, of heights, of widths."""
        return tuple(f"{self.prefix}.{kind}_position_embeddings" for kind in "xyhw")


@dataclass(frozen=True)
class Embedding:
    """What enters the first layer: dropout(norm(project(scale * words) + positions + types + tasks + boxes)), each
    where there is one.

    name     `{name}.weight` [vocab_size, width], the words; width is hidden_size unless they are projected to it
    project  from the words' width to hidden_size; frozen, and without an adapter
    types    learned, of the text of a pair that a token is of (the column token_types), where there are several rows
    tasks    learned, of the task of a text: each is of the first (ernie, as transformers without task_type_ids)
    boxes    learned, of where a token stands on a page
    projects_last  project is applied behind the norm instead, whose size is the words' width (electra)
    rounded  the scale is rounded to the compute dtype first (gemma)
    dropout  of the base, in training
    """

    name: str
    vocab_size: int
    hidden_size: int
    positions: Positions | None = None
    norm: Norm | None = None
    project: Linear | None = None
    types: Positions | None = None
    tasks: Positions | None = None
    boxes: Boxes | None = None
    projects_last: bool = False
    scale: float = 1.0
    rounded: bool = False
    dropout: float = 0.0

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def width(self) -> int:
        return self.hidden_size if self.project is None else self.project.in_features

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each tensor in the file."""
        yield self.weight, (self.vocab_size, self.width)
        width = self.width if self.projects_last else self.hidden_size
        for table in (self.positions, self.types, self.tasks):
            if table is not None and table.waves is None:
                yield table.weight, (table.rows, width)
        for name in () if self.boxes is None else self.boxes.names:
            yield f"{name}.weight", (self.boxes.rows, width)
        for part in (self.norm, self.project):
            yield from () if part is None else part.tensors()
