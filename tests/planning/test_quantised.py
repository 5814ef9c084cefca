"""What a plan reckons for a base in 8 or in 4 bits, beside what the matrices really hold."""

from dataclasses import replace

import pytest
import torch
from oracle import RandomWeight, fields_of

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.models.config import config_from_dict
from megalora.models.stage import Stage
from megalora.parallel.e4m3 import Fp8Matrix, Nf4AsFp8Matrix
from megalora.parallel.formats import BaseFormat
from megalora.parallel.linear import ParallelLinear
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement
from megalora.parallel.quantised import Scratch
from megalora.planning.devices import DEVICES
from megalora.planning.groups import Group
from megalora.planning.memory import stage_memory
from megalora.planning.nodes import Workload
from megalora.planning.quantised import beside_bytes
from megalora.planning.shapes import shape_of
from megalora.planning.timing import chunk_seconds

LARGE = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
GIB = 2**30


def lora(config):
    return resolve_lora(LoraConfig.from_dict({"r": 16, "target_modules": "all-linear"}), config)


@pytest.mark.parametrize("name", ["fp8", "nf4", "nf4_fp8"])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_bytes_are_those_of_the_matrices(name, tp):
    sizes = {"vocab_size": 132, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    config = config_from_dict(fields_of("llama", **sizes))
    base = BaseFormat(name)
    stage = Stage(config, range(2), Placement(Axis(0, tuple(range(tp))), False, torch.float32, "cpu", None, base))
    for linear in stage.modules():
        if isinstance(linear, ParallelLinear):
            linear.fill_weight(RandomWeight(torch.randn(linear.shard_dims()["weight"].global_shape)))
    held = sum(group.matrix.nbytes for group in stage.groups)
    rest = sum(p.nbytes for p in stage.parameters())
    work, shape = Workload(1, 64, element=4, base_format=name), shape_of(config, stage.lora, tp, "cpu")
    planned = stage_memory(shape, [range(2)], work, first=True, last=True)
    dense = stage_memory(shape, [range(2)], replace(work, base_format="dense"), first=True, last=True)
    # The scales of blocks of absmax are those of the whole weight on every rank: a few bytes for each 16,384 values.
    assert abs(planned.weights - (held + rest)) <= 0.01 * held
    assert base.scratch_bytes == planned.buffers - dense.buffers > 0


@pytest.mark.parametrize("made", [Fp8Matrix, Nf4AsFp8Matrix])
def test_terms_of_branches_are_counted(made, monkeypatch):
    """A matrix that is multiplied in e4m3 has its branch twice, in 16 bits and as codes."""
    group = Group((inputs := 128), (256, 64), (16, 16), 64, False, 0, 0)
    matrix = made(group.output, inputs, group.room, torch.bfloat16, "cpu", Scratch(), rank=group.rank)
    matrix._make_room()
    name = "fp8" if made is Fp8Matrix else "nf4_fp8"
    held = matrix._terms.nbytes + matrix._ones.nbytes
    assert beside_bytes(group, name, 2, "cuda") == held > beside_bytes(group, name, 2, "cpu") == 0
    config = config_from_dict(LARGE)
    shape = shape_of(config, lora(config), 2)
    planned = stage_memory(shape, [range(32)], Workload(1, 2048, base_format=name), first=True, last=True)
    monkeypatch.setattr("megalora.planning.memory.beside_bytes", lambda *_: 0)
    without = stage_memory(shape, [range(32)], Workload(1, 2048, base_format=name), first=True, last=True)
    terms = 32 * (14336 * 96 + 3072 * 144 + 2 * 4096 * 48)  # gate up, q k v, o and down on a rank of two
    assert 0 < planned.weights - without.weights - terms < 0.05 * terms  # and scales of 1


def test_an_8b_fits_and_is_fast_as_it_should():
    config = config_from_dict(LARGE)
    shape, device = shape_of(config, lora(config), 1), DEVICES["h100"]

    def of(name: str, tokens_rows: int = 4):
        work = Workload(tokens_rows, 2048, base_format=name)
        memory = stage_memory(shape, [range(32)], work, first=True, last=True)
        return memory, chunk_seconds(shape, range(32), work, device, first=True, last=True).total

    dense, fp8, nf4, nf4_fp8 = of("dense"), of("fp8"), of("nf4"), of("nf4_fp8")
    assert nf4[0].weights < 5.7 * GIB and 8 * GIB < fp8[0].weights < 9 * GIB < dense[0].weights
    assert 1.2 < dense[1] / fp8[1] < 1.6
    assert 1.0 < nf4[1] / dense[1] < 1.1
    assert nf4_fp8[0].weights < 5.7 * GIB and nf4_fp8[0].total < nf4[0].total + 0.5 * GIB
    assert 0.95 < fp8[1] / nf4_fp8[1] < 1.02
