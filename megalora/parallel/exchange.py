"""Products whose tokens travel meanwhile: what sequence parallelism gathers before a product and scatters after it.

The product is cut at the ranks' bounds, and the messages are plain copies into the other ranks' memory:

    gather    product of own rows | product of the others' rows
              copies to others    |
    scatter   product of the others' rows | product of own rows | sum
                                          | copies to others    |

GPUs of one host do such copies by their copy engines (megalora.parallel.peer_memory), beside the products. NCCL's
kernels gained nothing there (benchmarks/LOG.md): it seems that they wait for multiprocessors, which the product
holds until it ends. Without an exchange messages are collectives, before or after the whole product.

Legend: n ranks, T tokens on each, F = n T in all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

import torch

from megalora.parallel.collectives import all_gather, reduce_scatter
from megalora.parallel.mesh import Axis

# (rows [M, K], where to put the result [M, N] or None) -> the result
Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


class Link(Protocol):
    """Memory that all ranks of an axis write to, and the order of it."""

    def memory(self, nbytes: int) -> list[torch.Tensor]:
        """Return, by rank, [nbytes] uint8 of that rank's memory; one size on all ranks."""
        ...

    def meet(self) -> None:
        """Wait on the device: work queued after this runs after all ranks' work queued before it."""
        ...

    def beside(self) -> contextlib.AbstractContextManager:
        """Run what is queued inside after what was queued before, beside what follows."""
        ...

    def join(self) -> None:
        """Run what follows after what was queued inside `beside`."""
        ...


class Exchange:
    """The two of the legend, on one rank of an axis."""

    def __init__(self, axis: Axis, link: Link):
        self._axis, self._link = axis, link

    def gather(self, x: torch.Tensor, product: Product, width: int, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do as `gather_product`."""
        rank, n = self._axis.rank, self._axis.size
        link, places = self._link, self._places(x, *x.shape)
        self._meet()  # nobody reads any more what lay there
        with link.beside():
            for other in self._others():
                places[other][rank].copy_(x)
            if kept < x.shape[1]:
                places[rank][rank][:, kept:].copy_(x[:, kept:])
        y, full = x.new_empty(n, x.shape[0], width), places[rank]
        product(x, y[rank])
        self._meet(link.join)
        for block in self._blocks():
            product(full[block].flatten(0, 1), y[block].flatten(0, 1))
        return y.flatten(0, 1), full.flatten(0, 1)

    def scatter(self, x: torch.Tensor, product: Product, width: int) -> torch.Tensor:
        """Do as `product_scatter`."""
        rank, n = self._axis.rank, self._axis.size
        x = x.unflatten(0, (n, -1))
        link, places = self._link, self._places(x, x.shape[1], width)
        self._meet()
        terms = []  # held until the copies are done
        for block in self._blocks():
            term = x.new_empty(block.stop - block.start, x.shape[1], width)
            product(x[block].flatten(0, 1), term.flatten(0, 1))
            terms.append(term)
            with link.beside():
                for other in range(block.start, block.stop):
                    places[other][rank].copy_(term[other - block.start])
        received = places[rank]
        product(x[rank], received[rank])
        self._meet(link.join)
        return torch.add(received[0], received[1]) if n == 2 else received.sum(0)

    def _meet(self, join: Callable[[], None] = lambda: None) -> None:
        """Wait for the other ranks, after `join`: this counts as communication, the rest overlaps with products."""
        with self._axis.timed():
            join()
            self._link.meet()

    def _places(self, x: torch.Tensor, tokens: int, width: int) -> list[torch.Tensor]:
        """Return by rank its memory as [n, tokens, width] of x's dtype: a part for each sender."""
        shape = self._axis.size, tokens, width
        nbytes = x.itemsize * shape[0] * shape[1] * shape[2]
        return [memory.view(x.dtype).view(shape) for memory in self._link.memory(nbytes)]

    def _others(self) -> list[int]:
        """Return the next rank first, so that not all write to one."""
        rank, n = self._axis.rank, self._axis.size
        return [(rank + i) % n for i in range(1, n)]

    def _blocks(self) -> list[slice]:
        """Return the others, as ranges of ranks."""
        rank, n = self._axis.rank, self._axis.size
        return [block for block in (slice(0, rank), slice(rank + 1, n)) if block.start < block.stop]


def gather_product(
    x: torch.Tensor, product: Product, width: int, axis: Axis, exchange: Exchange | None, *, kept: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map x [T, K] of each rank to (product of all of them [F, width], all of them [F, K]), in rank order.

    With an exchange the second is memory that the next one writes to, and of this rank's own part of it only the
    columns from `kept` on are there.
    """
    if exchange is not None:
        return exchange.gather(x.contiguous(), product, width, kept)
    full = all_gather(x, axis)
    return product(full, None), full


def product_scatter(
    x: torch.Tensor, product: Product, width: int, axis: Axis, exchange: Exchange | None
) -> torch.Tensor:
    """Map x [F, K] of each rank to this rank's [T, width] of the sum of their products [F, width]."""
    if exchange is not None:
        return exchange.scatter(x, product, width)
    return reduce_scatter(product(x, None), axis)
