"""Work on a GPU recorded as CUDA graphs: by the layers in training (models/graphs.py) and by decoding (generation)."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Graph(Protocol):
    """Work that was recorded: `replay` does it again, on the same tensors."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector from freeing another graph during a recording, which would end it with an error."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Recorder:
    """Records work on a GPU as CUDA graphs, which share memory but for those whose results must last.

    error_mode  which calls of other threads may go on during a recording: "thread_local" all, "global" none that
                a capture cannot hold (see torch.cuda.graph)
    """

    def __init__(self, device: torch.device, error_mode: str = "thread_local"):
        self._pool, self._lasting = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()
        self._stream, self._error_mode = torch.cuda.Stream(device), error_mode

    def record(self, work: Callable[[], T], *, lasting: bool = False, warm_up: int = 0) -> tuple[T, Graph]:
        """Return (what `work` returns, a graph of it); the work itself is not done.

        warm_up  times that it is done before, for what libraries set up in their first calls
        """
        if warm_up:
            side = torch.cuda.Stream(self._stream.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(warm_up):
                    work()
            torch.cuda.current_stream().wait_stream(side)
        graph, pool = torch.cuda.CUDAGraph(), self._lasting if lasting else self._pool
        with (
            _no_collection(),
            torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode=self._error_mode),
        ):
            result = work()
        return result, graph

    def forget(self, graphs: Sequence[Graph]) -> None:
        """Give back the memory of these, which are all but the lasting ones."""
        torch.cuda.synchronize()
        for graph in graphs:
            graph.reset()
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()
