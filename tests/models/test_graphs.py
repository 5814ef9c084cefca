"""When layers run as CUDA graphs, and what the graphs read anew for each microbatch: here with a recorder that does the
work again, without a GPU. On a GPU: tests/test_gpu_step.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import fields_of
from spawn import spawn

import megalora.models.blocks.attention
from megalora.adapters.config import LoraConfig
from megalora.batch import Batch
from megalora.building import build_stage, resolve_lora
from megalora.errors import UserError
from megalora.models.config import config_from_dict
from megalora.models.graphs import _copy, _Graph, _layout, choose_graphs, tiled_by
from megalora.models.inputs import head_features, training_inputs
from megalora.ops.attention import Packed, attention
from megalora.parallel.grads import FlatGradients
from megalora.parallel.mesh import Axis, ParallelMesh, build_mesh
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits

TWO = Axis(0, (0, 1))


def place(device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Placement:
    return Placement(Axis(), False, dtype, device)


def test_one_gpu_a_replica_has_graphs():
    assert choose_graphs(None, place(), ParallelMesh(), 128) == (True, None)
    assert choose_graphs(None, place(), ParallelMesh(), 128, tokens=16384) == (True, None)
    assert choose_graphs(True, place(), ParallelMesh(), 128, tokens=1 << 20) == (True, None)
    used, note = choose_graphs(None, place(), ParallelMesh(), 128, tokens=1 << 20)
    assert not used and "1,048,576 tokens keeps a GPU busy" in note
    assert choose_graphs(True, place(dtype=torch.float16), ParallelMesh(dp=TWO), 128) == (True, None)


def test_so_have_tensor_parallel_ranks_whose_messages_are_not_timed():
    assert choose_graphs(None, place(), ParallelMesh(tp=TWO), 128) == (True, None)
    used, note = choose_graphs(None, place(), ParallelMesh(tp=TWO), 128, timed=True)
    assert not used and "wall_clock_breakdown" in note
    assert choose_graphs(None, place(), ParallelMesh(), 128, timed=True) == (True, None)


def test_on_a_cpu_nobody_expects_them():
    assert choose_graphs(None, place("cpu"), ParallelMesh(), 128) == (False, None)
    assert choose_graphs(False, place("cpu"), ParallelMesh(), 128) == (False, None)


@pytest.mark.parametrize(
    "where, mesh, head_dim, why",
    [
        (place(), ParallelMesh(pp=TWO), 128, "several microbatches"),
        (place(dtype=torch.float32), ParallelMesh(), 128, "float32"),
        (place(), ParallelMesh(), 100, "heads of 100"),
        (place(), ParallelMesh(), 264, "heads of 264"),
    ],
)
def test_a_gpu_without_them_says_why(where, mesh, head_dim, why):
    used, note = choose_graphs(None, where, mesh, head_dim)
    assert not used and "without CUDA graphs" in note and why in note
    with pytest.raises(UserError, match=f"cuda_graphs = true, but .*{why}.*leave the flag out"):
        choose_graphs(True, where, mesh, head_dim)


def test_without_by_request():
    assert choose_graphs(False, place(), ParallelMesh(), 128) == (False, "layers run without CUDA graphs: as asked")


def test_wanted_without_a_gpu():
    with pytest.raises(UserError, match="there is no GPU"):
        choose_graphs(True, place("cpu"), ParallelMesh(), 128)


# ---- what a graph reads anew


class Again:
    """A graph that does its work again, into the same tensors."""

    def __init__(self, work, result):
        self.work, self.result, self.gone = work, result, False

    def replay(self):
        assert not self.gone
        with torch.enable_grad():
            result = self.work()
        if result is not None:
            self.result.copy_(result)

    def reset(self):
        self.gone = True


class WithoutGpu:
    """Instead of a Recorder. Recording does no work: what it does to the gradients is undone."""

    def __init__(self, gradients: torch.Tensor):
        self.gradients, self.recorded, self.forgotten = gradients, 0, 0

    def record(self, work, *, lasting=False):
        before = self.gradients.clone()
        result = work()
        self.gradients.copy_(before)
        self.recorded += 1
        return result, Again(work, result)

    def forget(self, graphs):
        for graph in graphs:
            graph.reset()
        self.forgotten += 1


LENGTH = 24
EVEN, PIECES, MORE_PIECES = [12, 12], [10, 9, 5], [4, 4, 5, 11]


class World:
    def __init__(self, graphs: bool, mesh: ParallelMesh, family: str):
        self.config = config_from_dict(fields_of(family))
        lora = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": "all-linear"}
        self.place = Placement(mesh.tp, mesh.tp.size > 1, torch.float64, "cpu")
        resolved = resolve_lora(LoraConfig.from_dict(lora), self.config)
        self.stage, _ = build_stage(self.config, mesh, resolved, self.place)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.stage.parameters():
                p.normal_(std=0.2, generator=generator)
        self.gradients = FlatGradients(self.stage.trainable(), named_splits(self.stage), mesh)
        self.recorder = WithoutGpu(self.gradients.buffer)
        if graphs:
            self.stage.use_graphs()
            self.stage._graphs._recorder = self.recorder

    def step(self, number: int, lengths: list[int]) -> tuple[float, torch.Tensor]:
        """The loss and the gradients of one microbatch; the adapters then move."""
        ids = torch.randint(0, 100, (LENGTH,), generator=torch.Generator().manual_seed(number))
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in lengths])
        batch = Batch(ids, ids.roll(-1), positions, bounds, torch.arange(LENGTH) + number)
        inputs = training_inputs(batch, self.config, self.place, seed=3, step=number)
        self.stage.refresh_adapters()
        self.gradients.zero()
        loss = self.stage(None, replace(inputs, packed=Packed(bounds, max(lengths))))
        loss.backward()
        with torch.no_grad():
            for p in self.stage.trainable().values():
                p.sub_(p.grad, alpha=1e-3)
        return loss.item(), self.gradients.buffer.clone()


def on_the_device(q, k, v, bounds, window, packed, scores, dropout):
    """Attention on a CPU reads the bounds on the host; here those on the device, as kernels do."""
    return attention(q, k, v, packed.cu_seqlens.unique().tolist(), window, scores=scores)


LENGTHS = [EVEN, PIECES, EVEN, PIECES, MORE_PIECES, PIECES, EVEN, MORE_PIECES, [24], EVEN, [24]]


def with_and_without(rank: int, world_size: int, family: str = "llama") -> World:
    """Asserts that graphs give the same numbers on this rank of tensor parallel; returns the world that has them."""
    megalora.models.blocks.attention.attention = on_the_device
    mesh = build_mesh(rank, world_size, tp=world_size)
    plain, ours = World(False, mesh, family), World(True, mesh, family)
    for number, cut in enumerate(LENGTHS):
        (loss, gradients), (our_loss, our_gradients) = plain.step(number, cut), ours.step(number, cut)
        assert our_loss == loss and our_gradients.equal(gradients), (number, cut)
    return ours


def test_graphs_read_tokens_bounds_and_step_of_their_microbatch(monkeypatch):
    monkeypatch.setattr(megalora.models.blocks.attention, "attention", attention)  # put back afterwards
    ours = with_and_without(0, 1)
    # More pieces than before, and a new layout: either gives up what there is.
    assert ours.recorder.forgotten == 2
    captured = ["even", "pieces", "more pieces", "even", "even", "24"]
    assert ours.recorder.recorded == 1 + 2 * len(captured)
    graphs = [graph for pair in ours.stage._graphs._graphs.values() for graph in (pair.forward, pair.backward)]
    graphs.append(ours.stage._graphs._refresh_graph)
    ours.stage.close()
    assert len(graphs) > 2 and all(graph.gone for graph in graphs) and not ours.stage.uses_graphs


def test_graphs_read_the_ages_of_tokens_too(monkeypatch):
    """Those of short convolutions, in documents of other lengths."""
    monkeypatch.setattr(megalora.models.blocks.attention, "attention", attention)
    assert with_and_without(0, 1, "lfm2").recorder.recorded == 13


def on_a_rank(rank: int, world_size: int) -> int:
    return with_and_without(rank, world_size).recorder.recorded


def test_on_every_rank_of_tensor_parallel_with_its_part_of_the_tokens():
    assert spawn(on_a_rank, 2) == [13, 13]


def test_graphs_read_the_other_columns_of_their_microbatch_too():
    config, where = config_from_dict(fields_of("bert")), place("cpu", torch.float64)
    ids, bounds = torch.arange(12), torch.tensor([0, 7, 12], dtype=torch.int32)

    def inputs(types: torch.Tensor):
        batch = Batch(ids, ids, ids, bounds, ids, columns={"token_types": types})
        return replace(training_inputs(batch, config, where, seed=1, step=1), packed=Packed(bounds, 7))

    first, second = (inputs(torch.randint(0, 2, (12,), generator=torch.Generator().manual_seed(i))) for i in (1, 2))
    static = _copy(first, where, 3, 7)
    _Graph(static, None, None, None, None).load(second)
    assert static.columns["token_types"].equal(second.columns["token_types"])
    assert not first.columns["token_types"].equal(second.columns["token_types"]), "theirs stay as they are"
    assert _layout(first) != _layout(replace(first, columns={}))


def test_the_size_of_heads_is_that_which_kernels_see():
    """ALiBi adds features, and latent attention's values may have more than its keys."""
    size = {"hidden_size": 512, "n_head": 2, "n_layer": 1, "vocab_size": 99}
    assert head_features(config_from_dict({"model_type": "bloom", **size})) == 256 + 8
    config = config_from_dict(fields_of("deepseek_v3") | {"v_head_dim": 300})
    assert config.head_dim < 300 == head_features(config)


def test_a_bias_by_distance_goes_by_bounds_on_the_host_without_triton(monkeypatch):
    """As MPNet's, where no kernel fuses it: a graph would keep the bounds of the microbatch that it was made with."""
    config = config_from_dict(fields_of("mpnet"))
    for fused, said in ((True, None), (False, "a bias of the scores by distance")):
        monkeypatch.setattr("megalora.models.graphs.fuses", lambda *kinds, fused=fused: fused)
        assert tiled_by(config, place()) == said
