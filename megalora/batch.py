"""One microbatch as the model sees it: rows of packed documents, flattened to one axis of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from megalora.pictures import Picture


@dataclass(frozen=True)
class Context:
    """What a context-parallel rank must know of the tokens of all ranks (see megalora.data.context).

    place      [tokens of all ranks] int64 on the CPU: where each token stands when the ranks' own stand in a row
    lengths    of this rank's pieces, in the order of its tokens
    documents  where the document of each piece begins in the whole microbatch, and `stops`, where the piece ends
    """

    place: torch.Tensor
    lengths: tuple[int, ...]
    documents: tuple[int, ...]
    stops: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """`rows` packed rows of `seq_length` tokens, flattened: T = rows * seq_length.

    input_ids     [T] int64
    labels        [T] int64, already shifted: labels[t] is the token to predict at position t, -100 where there is none
    position_ids  [T] int64, restart at 0 in each document
    cu_seqlens    [documents + 1] int32, bounds of the documents in T; each row boundary is a bound, and the padding
                  tail of a row stands apart, in short documents
    token_index   [T] int64, row_in_step * seq_length + offset: the token's place in the global batch of the step,
                  the same on every layout (dropout draws from it)
    context       with context parallelism: T are this rank's tokens, and cu_seqlens the bounds of its pieces
    columns       [T] or [T, k] int64 each, what else a model reads of each token, by name (token types, boxes)
    weights       [T] float32, what each label counts for in the loss; None: 1 each
    source        of an encoder-decoder: what the encoder reads, a batch of as many rows without labels
    pictures      images that stand before documents; the column "pictures", [T, 2], has of each of their tokens which
                  of them it is of, counted from 1, and which of its vectors; (0, 0) of all other tokens
    crossing      cumulative bounds in T and in the source's tokens of each document and its source
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    token_index: torch.Tensor
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    context: Context | None = None
    weights: torch.Tensor | None = None
    source: Batch | None = None
    crossing: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    pictures: tuple[Picture, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        apart = ("columns", "context", "source", "crossing", "pictures")
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        moved: dict[str, Any] = {name: to_device(one, device) for name, one in given.items() if one is not None}
        columns = {name: to_device(column, device) for name, column in self.columns.items()}
        return replace(self, **moved, columns=columns)


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a CPU tensor on the device; the host waits for nothing that the device has yet to do."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # a copy from memory that can be paged out would wait
    return tensor.to(device, non_blocking=True)
