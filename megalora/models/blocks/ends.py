"""The ends of a model: what enters the first layer, and what the head reads. Frozen, but for what an adapter trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megalora.adapters.words import WordsAdapter
from megalora.models import spec
from megalora.models.blocks.norm import NORMS
from megalora.models.blocks.prefix import PrefixBlock
from megalora.models.inputs import Inputs
from megalora.models.names import hang
from megalora.ops.dropout import drop, named_site
from megalora.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from megalora.parallel.placement import Placement
from megalora.parallel.trained_words import TrainedEmbedding, TrainedHead


class Frozen(nn.Module):
    """Frozen tensors that every tp rank holds whole: `weight`, and `bias` where there is one."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: tuple[int, ...], bias: tuple[int, ...] | None, place: Placement):
        super().__init__()
        for name, shape in (("weight", weight), ("bias", bias)):
            values = None if shape is None else torch.empty(shape, dtype=place.dtype, device=place.device)
            self.register_parameter(name, None if values is None else nn.Parameter(values, requires_grad=False))


class Waves:
    """Positions that are computed: `weight` [rows, hidden_size]."""

    def __init__(self, positions: spec.Positions, place: Placement):
        assert positions.waves is not None
        dtype = torch.float64 if positions.precise else torch.float32
        angles = torch.arange(positions.rows, dtype=dtype)[:, None] * torch.tensor(positions.waves, dtype=dtype)
        values = torch.cat([angles.sin(), angles.cos()], 1).float()  # what transformers rounds them to
        self.weight = values.to(place.dtype).to(place.device)


class Projection:
    """A frozen linear between the widths of the words and of the layers, on each rank's own tokens."""

    def __init__(self, root: nn.Module, linear: spec.Linear, place: Placement):
        shapes = {name.rpartition(".")[2]: shape for name, shape in linear.tensors()}
        self._module = Frozen(shapes["weight"], shapes.get("bias"), place)
        hang(root, linear.name, self._module)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, in_features] to [T, out_features]."""
        return nn.functional.linear(x, self._module.weight, self._module.bias)


def words_of(
    root: nn.Module, embedding: spec.Embedding, place: Placement, adapter: WordsAdapter
) -> VocabParallelEmbedding:
    """Build the matrix of an embedding, with what is trained of it, and register it below `root`."""
    sizes = embedding.vocab_size, embedding.width
    words = (
        TrainedEmbedding(embedding.name, *sizes, place, adapter)
        if adapter.trains
        else VocabParallelEmbedding(*sizes, place)
    )
    hang(root, embedding.name, words)
    return words


class EmbeddingBlock:
    """dropout(norm(project(scale * words) + positions + types + tasks + boxes)), each where the spec has it; or, where
    it projects last, project(dropout(norm(scale * words + positions + types))).

    The words are cut over tp, the rest is not.
    """

    def __init__(
        self,
        root: nn.Module,
        embedding: spec.Embedding,
        place: Placement,
        words: VocabParallelEmbedding,
        site: str = "embedding",
        prefix: PrefixBlock | None = None,
    ):
        """Build it.

        words   registered below `root`; site: name of the dropout of the base
        prefix  what makes vectors of images, which take the places of words
        """
        self.spec, self._place, self.words, self._site = embedding, place, words, named_site(site)
        self.prefix = prefix
        self._scale = embedding.scale
        if embedding.rounded:
            self._scale = torch.tensor(embedding.scale, dtype=place.dtype).item()
        self._project = None if embedding.project is None else Projection(root, embedding.project, place)
        width = embedding.width if embedding.projects_last else embedding.hidden_size
        self._positions, self._types, self._tasks = (
            self._table(root, table, width) for table in (embedding.positions, embedding.types, embedding.tasks)
        )
        self._boxes: list[Frozen] = []  # tables of left and right, top and bottom, heights, widths
        for name in () if embedding.boxes is None else embedding.boxes.names:
            self._boxes.append(Frozen((embedding.boxes.rows, width), None, place))
            hang(root, name, self._boxes[-1])
        self._norm = None if embedding.norm is None else NORMS[embedding.norm.kind](embedding.norm, place)
        if embedding.norm is not None:
            hang(root, embedding.norm.name, self._norm)

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Return [T, hidden_size] of this rank's tokens under sequence parallelism, else of all."""
        hidden = self.words(inputs.input_ids)
        if self._scale != 1.0:
            hidden = hidden * self._scale
        if inputs.placed is not None:
            hidden = self.prefix.put(hidden, inputs.placed)
        if self._project is not None and not self.spec.projects_last:
            hidden = self._project(hidden)
        if self._positions is not None:
            rows = self._place.own_tokens(inputs.position_ids) + self.spec.positions.offset
            hidden = hidden + nn.functional.embedding(rows, self._positions.weight)
        if self._types is not None and self.spec.types.rows == 1:
            hidden = hidden + self._types.weight[0]
        elif self._types is not None:
            rows = self._place.own_tokens(inputs.columns["token_types"])
            hidden = hidden + nn.functional.embedding(rows, self._types.weight)
        if self._tasks is not None:
            hidden = hidden + self._tasks.weight[0]
        if self._boxes:
            hidden = hidden + self._placed(self._place.own_tokens(inputs.columns["boxes"]))
        if self._norm is not None:
            hidden = self._norm(hidden)
        hidden = drop(hidden, inputs.tokens.local, inputs.tokens.draw(self.spec.dropout, self._site))
        return self._project(hidden) if self._project is not None and self.spec.projects_last else hidden

    def _placed(self, boxes: torch.Tensor) -> torch.Tensor:
        """Return [T, width], what boxes [T, 4] (left, top, right, bottom) add to the words."""
        left, top, right, bottom = boxes.unbind(1)
        rows = ((left, right), (top, bottom), (bottom - top,), (right - left,))
        parts = [
            nn.functional.embedding(row, table.weight)
            for table, some in zip(self._boxes, rows, strict=True)
            for row in some
        ]
        return torch.stack(parts).sum(0)

    def _table(self, root: nn.Module, table: spec.Positions | None, width: int) -> Frozen | Waves | None:
        if table is None:
            return None
        if table.waves is not None:
            return Waves(table, self._place)
        module = Frozen((table.rows, width), None, self._place)
        hang(root, table.name, module)
        return module


class HeadBlock:
    """What turns the final hidden states into logits: a projection where the spec has one, and the words' matrix."""

    def __init__(self, root: nn.Module, config: spec.ModelSpec, place: Placement, adapter: WordsAdapter, tied: bool):
        """Build the head. tied: rows of tokens that the embedding trains are the head's too."""
        assert isinstance(config.head, spec.Head)
        head, sizes = config.head, (config.vocab_size, config.embedding.width)
        options: dict[str, Any] = {"bias": head.bias, "scale": head.scale, "softcap": head.softcap}
        self.words = (
            TrainedHead(head.name, *sizes, place, adapter, **options)
            if adapter.trains or tied
            else VocabParallelHead(*sizes, place, **options)
        )
        hang(root, head.name, self.words)
        if head.bias_row is not None:
            root.register_parameter(head.bias_row, self.words.take_bias_row())
        self._project = None if head.project is None else Projection(root, head.project, place)

    def reads(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the words' matrix reads, [T, width], of the normed hidden states [T, hidden_size]."""
        return hidden if self._project is None else self._project(hidden)
