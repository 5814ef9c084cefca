"""Checkpoints that are quantised already: read as bitsandbytes, DeepSeek and compressed-tensors write them."""

import pytest
import torch
from quantised import KINDS, Q, decoded, make

from megalora.building import base_names, load_base_weights, resolve_base
from megalora.checkpoint.base.weights import model_fingerprint, open_base
from megalora.errors import UserError
from megalora.models.config import read_config
from megalora.models.stage import Stage
from megalora.parallel.formats import BaseFormat
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement


def loaded(folder, base: BaseFormat, tp: int = 1, rank: int = 0) -> Stage:
    config = read_config(folder)
    stage = Stage(config, range(2), Placement(Axis(rank, tuple(range(tp))), False, torch.float32, "cpu", None, base))
    load_base_weights(stage, folder)
    return stage


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_holds_the_very_values_of_the_file(tmp_path, kind):
    folder = make(tmp_path, kind, dense=("down_proj",))
    config = read_config(folder)
    assert config.stored == ("nf4" if kind == "bitsandbytes" else "fp8")
    stages = [loaded(folder, resolve_base("auto", config)), loaded(folder, BaseFormat("dense"))]
    parts = [loaded(folder, resolve_base("auto", config), 2, rank) for rank in range(2)]
    for own, dense, *cut in zip(*([g for g in s.groups] for s in (*stages, *parts)), strict=True):
        whole = own.matrix.weight(slice(0, own.matrix.rows))
        values = dense.matrix.weight(slice(0, dense.matrix.rows))
        # Dense weights go through the dtype in which the file was quantised.
        torch.testing.assert_close(whole, values, rtol=2**-8, atol=0)
        assert whole.bfloat16().equal(values.bfloat16())
        if own.row_parallel:
            assert torch.cat([g.matrix.weight(slice(0, g.matrix.rows)) for g in cut], 1).equal(whole)
        else:
            rows = [g.matrix.weight(r) for g in cut for r in g.rows]
            joined = [torch.cat(rows[i :: len(own.rows)]) for i in range(len(own.rows))]
            assert torch.cat(joined).equal(whole)
    bytes_of = [sum(g.matrix.nbytes for g in s.groups) for s in stages]
    assert bytes_of[0] < 0.5 * bytes_of[1]


@pytest.mark.parametrize("kind", ["bitsandbytes", "blocks"])
def test_slices_are_those_of_the_whole(tmp_path, kind):
    folder = make(tmp_path, kind)
    weights, whole = open_base(folder, base_names(read_config(folder))), decoded(folder, Q)
    for index in ((slice(3, 50), slice(0, 128)), (slice(0, 128), slice(7, 33)), (slice(9, 10), slice(64, 128))):
        out = torch.empty(index[0].stop - index[0].start, index[1].stop - index[1].start)
        weights.copy(Q, index, out)
        assert out.equal(whole[index])
    assert weights.dtype(Q) == torch.bfloat16 and len(model_fingerprint(folder, base_names(read_config(folder)))) == 64


def test_another_format_than_the_file_s_is_made_of_its_values(tmp_path):
    folder = make(tmp_path, "bitsandbytes")
    stage = loaded(folder, BaseFormat("fp8"))
    group = stage.groups[0]
    found = group.matrix.weight(group.rows[0])
    assert 0 < (found - decoded(folder, Q)).norm() / found.norm() < 0.04


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name]) if callable(value) else value})


def spoiled(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[1] = float("nan")
    return x


def text(x: torch.Tensor, old: bytes, new: bytes) -> torch.Tensor:
    data = bytes(x.tolist())
    assert old in data
    return torch.tensor(list(data.replace(old, new)), dtype=torch.uint8)


NF4 = f"{Q}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "kind, change, parts",
    [
        ("bitsandbytes", drop(f"{Q}.absmax"), ["lacks", f"{Q}.absmax"]),
        ("bitsandbytes", drop(NF4), [f"{Q} is in 4 bits", "is missing"]),
        ("bitsandbytes", put(NF4, lambda x: x[:-1]), [NF4, "damaged"]),
        ("bitsandbytes", put(NF4, torch.full((50_000,), 91, dtype=torch.uint8)), [NF4, "damaged"]),  # brackets
        ("bitsandbytes", put(NF4, lambda x: x.float()), [NF4, "damaged"]),
        ("bitsandbytes", put(NF4, lambda x: text(x, b'_blocksize": 256', b'_blocksize": 0')), ["damaged"]),
        ("bitsandbytes", put(f"{Q}.quant_map", lambda x: (x + 0.1).view(2, 8)), ["not that of NF4"]),
        ("bitsandbytes", put(f"{Q}.nested_absmax", lambda x: x[:0]), [f"{Q}.nested_absmax holds 0 values"]),
        ("bitsandbytes", put(f"{Q}.quant_map", lambda x: x + 0.1), [f"{Q}.quant_map", "not that of NF4"]),
        ("bitsandbytes", put(f"{Q}.nested_quant_map", spoiled), [f"{Q}.nested_quant_map", "not finite"]),
        ("blocks", drop(f"{Q}_scale_inv"), [Q, "has no scale"]),
        ("blocks", put(f"{Q}_scale_inv", lambda x: x[:, :3].contiguous()), ["[4, 3]", "blocks of 32 x 32 has [4, 4]"]),
        ("blocks", put(f"{Q}_scale_inv", spoiled), [f"{Q}_scale_inv", "not finite"]),
        ("blocks", put(f"{Q}_scale_inv", lambda x: x.to(torch.int32)), [f"{Q}_scale_inv in I32 is not read"]),
        ("blocks", put(f"{Q}_scale", torch.ones(1)), ["has the scales"]),
        ("blocks", put(Q, lambda x: x.view(2, -1, x.shape[1])), [Q, "has not two dimensions"]),
        ("blocks", put(Q, lambda x: x.bfloat16()), [f"{Q} is BF16", f"{Q}_scale_inv"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_scales_is_one_line(tmp_path, kind, change, parts):
    folder = make(tmp_path, kind, change=change)
    with pytest.raises(UserError) as raised:
        loaded(folder, resolve_base("auto", read_config(folder)))
    assert all(part in str(raised.value) for part in parts), raised.value
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


@pytest.mark.parametrize(
    "config, part",
    [
        ({"quant_method": "gptq"}, "quant_method = 'gptq' is not read"),
        ({"quant_method": ["fp8"]}, "quant_method = ['fp8'] is not read"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "8-bit format is not read"),
        ({"bnb_4bit_quant_type": "fp4"}, "'fp4' is not read"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "'e5m2' is not read"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size = [0, 1]"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"type": "int"}}}}, "type int"),
        ({"quant_method": "compressed-tensors"}, "without config_groups"),
    ],
)
def test_other_ways_of_quantising_are_refused_by_name(tmp_path, config, part):
    with pytest.raises(UserError, match="take the model's unquantised checkpoint") as raised:
        make(tmp_path, **config)
    assert part in str(raised.value) and "config.json" in str(raised.value)
