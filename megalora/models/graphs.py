"""The layers of a stage as CUDA graphs: one launch for forward, one for backward, and the same numbers.

A step of few tokens waits for the host, which launches some thousand small kernels. A graph is captured once for each
layout of a microbatch (documents of one length, or of several) and replayed for every microbatch of that layout: what
differs between them, the tokens, the documents' bounds and chunks and the step that dropout draws from, is read from
memory. The head and the loss stay outside, for the number of labelled tokens differs.

All graphs share one pool of memory, which holds the activations of one microbatch. The first microbatch of a layout
runs without a graph: that readies what cannot be readied during a capture (plans of cuDNN, workspaces, NCCL's
connections). Graphs there may be are given up before it, so that activations are never held twice, and captured again
when they are needed. Tensor-parallel ranks see the same microbatches, so they capture and replay together: their
collectives are part of the graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megalora.errors import UserError
from megalora.models.inputs import Inputs, head_features
from megalora.models.mixers import Attention, Disentangled, RelativeTable
from megalora.models.recorder import Graph, Recorder
from megalora.models.recurrent import DeltaAttention, GatedConvolution, RecurrentMixer
from megalora.models.spec import ModelSpec
from megalora.ops.attention import Packed, is_even, packs
from megalora.ops.fused_attention import fuses
from megalora.ops.fused_delta import takes
from megalora.ops.grouped import runs_grouped
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.placement import Placement

BUSY = 32768  # tokens of a microbatch from which on the host is far ahead of a GPU: graphs would only take memory


def choose_graphs(
    wanted: bool | None,
    place: Placement,
    mesh: ParallelMesh,
    head_dim: int,
    experts: bool = False,
    *,
    timed: bool = False,
    offloads: bool = False,
    tiled: str | None = None,
    trains_words: bool = False,
    prefixed: bool = False,
    tokens: int = 0,
) -> tuple[bool, str | None]:
    """Return (whether layers run as graphs, a line that says why they do not on a GPU). wanted None: wherever they
    serve.

    experts   the model has experts
    timed     the communication inside layers is to be timed (wall_clock_breakdown, profile)
    offloads  activations are kept in host memory
    tiled     what makes attention go by the documents' bounds on the host
    trains_words  something of the embedding or of the head is trained
    prefixed  images stand before texts
    tokens    of a microbatch: from BUSY on there are graphs where they are wanted only
    Raises UserError where they are wanted and cannot be.
    """
    on_gpu = torch.device(place.device).type == "cuda"
    obstacle = None
    if not on_gpu:
        obstacle = "there is no GPU"
    elif mesh.pp.size > 1:
        obstacle = "a pipeline stage holds several microbatches at a time, and graphs hold one"
    elif place.cp.size > 1:
        obstacle = "context parallelism finds the keys of each microbatch anew"
    elif offloads:
        obstacle = "activations are kept in host memory"
    elif timed and mesh.tp.size > 1:
        obstacle = "wall_clock_breakdown and profile time the collectives inside layers"
    elif prefixed:
        obstacle = "the vectors of images are found anew for each microbatch"
    elif trains_words:
        obstacle = "the embedding or the head is trained"
    elif place.dtype not in (torch.bfloat16, torch.float16):
        obstacle = f"attention in {str(place.dtype).removeprefix('torch.')} is another call for other documents"
    elif not packs(head_dim, place.dtype, torch.device(place.device)):
        obstacle = f"attention with heads of {head_dim} is another call for other documents"
    elif experts and not runs_grouped(torch.device(place.device), place.dtype):
        obstacle = "experts run in one grouped product, without counts on the host, in bfloat16 only"
    elif tiled:
        obstacle = f"attention with {tiled} is other calls for other documents"
    if wanted and obstacle:
        raise UserError(f"cuda_graphs = true, but {obstacle}", "leave the flag out")
    if wanted is None and obstacle is None and tokens >= BUSY:
        obstacle = f"a microbatch of {tokens:,} tokens keeps a GPU busy without them, and they would take memory"
    if obstacle or wanted is False:
        return False, f"layers run without CUDA graphs: {obstacle or 'as asked'}" if on_gpu else None
    return True, None


def layer_facts(config: ModelSpec, place: Placement) -> dict[str, Any]:
    """Return what `choose_graphs` is to know of a model's layers at `place`."""
    return {
        "head_dim": head_features(config),
        "experts": config.has_experts,
        "tiled": tiled_by(config, place),
        "prefixed": config.prefix is not None,
    }


def tiled_by(config: ModelSpec, place: Placement) -> str | None:
    """Return what makes attention on a GPU go by the documents' bounds on the host, None where it does not."""
    device = torch.device(place.device)
    for mixer in config.mixers:
        linear = isinstance(mixer, DeltaAttention) and takes(place.dtype, device, mixer.key, mixer.value)
        if isinstance(mixer, RecurrentMixer) and not (linear or isinstance(mixer, GatedConvolution)):
            return "states in plain torch"
    attentions = [mixer for mixer in config.mixers if isinstance(mixer, Attention)]
    if config.chunks:
        return "chunks"
    if config.encoder is not None:
        return "two lengths of a document"
    if fuses(head_features(config), torch.bfloat16, torch.device("cuda")):
        return None
    if any(isinstance(attention.position, Disentangled) for attention in attentions):
        return "scores of content against position"
    if any(isinstance(attention.position, RelativeTable) for attention in attentions):
        return "a bias of the scores by distance"
    if any(attention.softcap is not None for attention in attentions):
        return "softcap"
    return "dropout" if any(attention.dropout > 0 for attention in attentions) else None


class LayerGraphs:
    """Runs `layers(inputs)`, the hidden states of a microbatch from its inputs, and its backward pass as graphs.

    Gradients are added to the `.grad` of the parameters, in place: these must stay where they are.
    """

    def __init__(self, layers: Callable[[Inputs], torch.Tensor], refresh: Callable[[], None], place: Placement):
        self._layers, self._refresh, self._place = layers, refresh, place
        self._graphs: dict[Hashable, _Graph] = {}
        self._largest: dict[Hashable, tuple[int, int]] = {}  # of each layout seen: most bounds, longest document
        self._refreshes = 0
        self._refresh_graph: Graph | None = None
        self._anchor = torch.zeros((), device=place.device, requires_grad=True)  # what makes autograd call backward
        self._running = False  # a forward pass waits for its backward pass, and its activations stand in the pool

    def refresh(self) -> None:
        """Run `refresh`, which brings the adapters into the compute dtype, as a graph from the second time on."""
        self._refreshes += 1
        if self._refreshes == 1:
            self._refresh()
            return
        if self._refresh_graph is None:
            self._refresh_graph = self._recorder.record(self._refresh, lasting=True)[1]
        self._refresh_graph.replay()

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Return layers(inputs)."""
        layout, size = _layout(inputs), _size(inputs)
        known, graph = layout in self._largest, self._graphs.get(layout)
        bounds, longest = self._largest.get(layout, size)
        self._largest[layout] = max(bounds, size[0]), max(longest, size[1])
        # The layers read what refresh() wrote: its graph, whose tensors stay where they are, is captured first.
        if self._running or self._refresh_graph is None:
            return self._layers(inputs)
        if not known or (graph is not None and not graph.takes(size)):
            self._give_up()
            return self._layers(inputs)
        if graph is None:
            graph = self._graphs[layout] = self._captured(inputs, *self._largest[layout])
        graph.load(inputs)
        self._running = True
        return _Replay.apply(self._anchor, self, graph)

    def done(self) -> None:
        self._running = False

    def close(self) -> None:
        """Give up every graph, for good: NCCL does not close a connection that a graph still uses."""
        recorded = [graph for pair in self._graphs.values() for graph in (pair.forward, pair.backward)]
        for graph in [*recorded, self._refresh_graph]:
            if graph is not None:
                graph.reset()
        self._graphs, self._refresh_graph = {}, None

    @functools.cached_property
    def _recorder(self) -> Recorder:
        # "thread_local": other threads (a save that copies from the GPU) may go on meanwhile.
        return Recorder(torch.device(self._place.device), error_mode="thread_local")

    def _give_up(self) -> None:
        """Free all graphs of layers and the memory of their activations."""
        if self._graphs:
            graphs = [recorded for graph in self._graphs.values() for recorded in (graph.forward, graph.backward)]
            self._graphs.clear()
            self._recorder.forget(graphs)

    def _captured(self, inputs: Inputs, bounds: int, longest: int) -> _Graph:
        static, alive = _copy(inputs, self._place, bounds, longest), []

        def forward() -> torch.Tensor:
            alive.append(self._layers(static))
            return alive[0].detach()

        out, forward_graph = self._recorder.record(forward)
        d_out = torch.empty_like(out)
        _, backward_graph = self._recorder.record(lambda: torch.autograd.backward(alive.pop(), d_out))
        return _Graph(static, forward_graph, out, d_out, backward_graph)


def _layout(inputs: Inputs) -> Hashable:
    """Return what a graph is captured for: documents of several lengths are one layout."""
    bounds = inputs.bounds if is_even(inputs.bounds) else None
    return inputs.input_ids.shape[0], inputs.tokens.seed, bounds, tuple(inputs.columns)


def _size(inputs: Inputs) -> tuple[int, int]:
    return inputs.packed.cu_seqlens.shape[0], inputs.packed.longest


@dataclass(frozen=True)
class _Graph:
    """static: where the graph reads its microbatch; out: the hidden states it writes; d_out: the gradient it reads."""

    static: Inputs
    forward: Graph
    out: torch.Tensor
    d_out: torch.Tensor
    backward: Graph

    def takes(self, size: tuple[int, int]) -> bool:
        """Return whether so many bounds and so long a document fit."""
        bounds, longest = _size(self.static)
        return size[0] <= bounds and size[1] <= longest

    def load(self, inputs: Inputs) -> None:
        for place, value in zip(_tensors(self.static), _tensors(inputs), strict=True):
            place.copy_(value)
        _put_bounds(self.static.packed.cu_seqlens, inputs)
        if self.static.documents is not None:
            assert inputs.documents is not None
            self.static.documents.put(inputs.documents)
        step = self.static.tokens.step
        assert isinstance(step, torch.Tensor)
        step.fill_(inputs.tokens.step)


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    """Return those that layers read and that differ from one microbatch of a layout to the next; the bounds apart."""
    positions = [] if inputs.position_ids is None else [inputs.position_ids]
    tables = (table for pair in inputs.tables.values() for table in pair)
    return [inputs.input_ids, inputs.tokens.index, *positions, *inputs.columns.values(), *tables]


def _put_bounds(place: torch.Tensor, inputs: Inputs) -> None:
    """Put the bounds, and empty documents behind the last."""
    bounds = inputs.packed.cu_seqlens
    place.fill_(inputs.input_ids.shape[0])
    place[: bounds.shape[0]].copy_(bounds)


def _copy(inputs: Inputs, place: Placement, bounds: int, longest: int) -> Inputs:
    input_ids, index, *tables = (tensor.clone() for tensor in _tensors(inputs))
    position_ids = None if inputs.position_ids is None else tables.pop(0)
    columns = {name: tables.pop(0) for name in inputs.columns}
    step = torch.tensor(inputs.tokens.step, dtype=torch.int64, device=index.device)
    tokens = replace(inputs.tokens, index=index, local=place.own_tokens(index), step=step)
    cu_seqlens = inputs.packed.cu_seqlens.new_empty(bounds)
    _put_bounds(cu_seqlens, inputs)
    return replace(
        inputs,
        input_ids=input_ids,
        labels=None,
        labelled=None,
        tables=dict(zip(inputs.tables, zip(tables[::2], tables[1::2], strict=True), strict=True)),
        tokens=tokens,
        packed=Packed(cu_seqlens, longest),
        position_ids=position_ids,
        columns=columns,
        documents=None if inputs.documents is None else inputs.documents.alike(bounds - 1),
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
