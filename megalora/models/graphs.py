"""The layers of a stage as CUDA graphs: one launch for forward, one for backward, and the same numbers.

A step of few tokens waits for the host, which launches some thousand small kernels. A graph is captured once for each
layout of a microbatch (how many tokens, whether the documents are of one length) and replayed for every microbatch of
that layout: what differs between them, the tokens, the documents' bounds and the step that dropout draws from, is read
from memory. The head and the loss stay outside, for the number of labelled tokens differs.

All graphs share one pool of memory, which holds the activations of one microbatch. The first microbatch of a layout
runs without a graph: that readies what cannot be readied during a capture (plans of cuDNN, workspaces).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch

from megalora.errors import UserError
from megalora.models.inputs import Inputs
from megalora.ops.attention import is_even
from megalora.parallel.linear import Placement
from megalora.parallel.mesh import ParallelMesh


def choose_graphs(wanted: bool | None, place: Placement, mesh: ParallelMesh) -> tuple[bool, str | None]:
    """(whether layers run as graphs, a line that says why they do not on a GPU). wanted None: wherever they serve.

    Raises UserError where they are wanted and cannot be.
    """
    on_gpu = torch.device(place.device).type == "cuda"
    obstacle = None
    if not on_gpu:
        obstacle = "there is no GPU"
    elif mesh.tp.size > 1 or mesh.pp.size > 1:
        obstacle = "messages between tensor-parallel or pipeline ranks are not captured"
    elif place.dtype not in (torch.bfloat16, torch.float16):
        obstacle = f"attention in {str(place.dtype).removeprefix('torch.')} is another call for other documents"
    if wanted and obstacle:
        raise UserError(f"cuda_graphs = true, but {obstacle}: leave the flag out")
    if obstacle or wanted is False:
        return False, f"layers run without CUDA graphs: {obstacle or 'as asked'}" if on_gpu else None
    return True, None


class LayerGraphs:
    """Runs `layers(inputs)`, the hidden states of a microbatch from its inputs, and its backward pass as graphs.

    Gradients are added to the `.grad` of the parameters, in place: these must stay where they are.
    """

    def __init__(self, layers: Callable[[Inputs], torch.Tensor], refresh: Callable[[], None], device: torch.device):
        self._layers, self._refresh = layers, refresh
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[Hashable, _Graph | None] = {}  # None: seen once
        self._refreshes = 0
        self._refresh_graph: torch.cuda.CUDAGraph | None = None
        self._anchor = torch.zeros((), device=device, requires_grad=True)  # what makes autograd call backward
        self._running = False  # a forward pass waits for its backward pass, and its activations stand in the pool

    def refresh(self) -> None:
        """Runs `refresh`, which brings the adapters into the compute dtype, as a graph from the second time on."""
        self._refreshes += 1
        if self._refreshes == 1:
            self._refresh()
            return
        if self._refresh_graph is None:
            self._refresh_graph = torch.cuda.CUDAGraph()
            with self._capture(self._refresh_graph):
                self._refresh()
        self._refresh_graph.replay()

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """layers(inputs)."""
        key = _layout(inputs)
        # The layers read what refresh() wrote: its graph, whose tensors stay where they are, is captured first.
        if self._running or self._refresh_graph is None or key not in self._graphs:
            self._graphs.setdefault(key, None)
            return self._layers(inputs)
        if self._graphs[key] is None:
            self._graphs[key] = self._captured(inputs)
        graph = self._graphs[key]
        graph.load(inputs)
        self._running = True
        return _Replay.apply(self._anchor, self, graph)

    def done(self) -> None:
        self._running = False

    def _captured(self, inputs: Inputs) -> _Graph:
        static = _copy(inputs)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._capture(forward):
            out = self._layers(static)
        d_out = torch.empty_like(out)
        with self._capture(backward):
            torch.autograd.backward(out, d_out)
        return _Graph(static, forward, out.detach(), d_out, backward)

    def _capture(self, graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
        # "thread_local": other threads (a save that copies from the GPU) may go on meanwhile.
        return torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")


def _layout(inputs: Inputs) -> Hashable:
    """What a graph is captured for."""
    bounds = inputs.bounds if is_even(inputs.bounds) else (inputs.packed.cu_seqlens.shape[0], inputs.packed.longest)
    return inputs.input_ids.shape[0], inputs.tokens.seed, bounds


@dataclass(frozen=True)
class _Graph:
    """static: where the graph reads its microbatch; out, d_out: the hidden states it writes, their gradient it reads."""

    static: Inputs
    forward: torch.cuda.CUDAGraph
    out: torch.Tensor
    d_out: torch.Tensor
    backward: torch.cuda.CUDAGraph

    def load(self, inputs: Inputs) -> None:
        places, values = _tensors(self.static), _tensors(inputs)
        for place, value in zip(places, values, strict=True):
            place.copy_(value)
        self.static.tokens.step.fill_(inputs.tokens.step)


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    """Those that layers read and that differ from one microbatch of a layout to the next."""
    return [inputs.input_ids, inputs.cos, inputs.sin, inputs.tokens.index, inputs.packed.cu_seqlens]


def _copy(inputs: Inputs) -> Inputs:
    input_ids, cos, sin, index, cu_seqlens = (tensor.clone() for tensor in _tensors(inputs))
    step = torch.tensor(inputs.tokens.step, dtype=torch.int64, device=index.device)
    tokens = replace(inputs.tokens, index=index, local=index, step=step)  # one tensor-parallel rank: all are local
    packed = replace(inputs.packed, cu_seqlens=cu_seqlens)
    return replace(
        inputs, input_ids=input_ids, labels=None, labelled=None, cos=cos, sin=sin, tokens=tokens, packed=packed
    )


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, graphs, graph):
        ctx.graphs, ctx.graph = graphs, graph
        graph.forward.replay()
        return graph.out.detach()

    @staticmethod
    def backward(ctx, d_out):
        ctx.graph.d_out.copy_(d_out)
        ctx.graph.backward.replay()
        ctx.graphs.done()
        return None, None, None
