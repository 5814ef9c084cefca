"""Adapters in the three forms in which Merak writes them, and what is not one of them."""

import collections
import json
import os
import pickle

import pytest
import torch

from megalora.adapters.config import LoraConfig
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.shards import save_adapter
from megalora.checkpoint.layout import Layout
from megalora.errors import UserError
from megalora.parallel.split import Split

# As the dataclass of Merak is written: every field, sets as lists, in alphabetical order.
CONFIG = {
    "alpha_pattern": {}, "bias": "none", "fan_in_fan_out": False, "inference_mode": False, "init_lora_weights": True,
    "layers_pattern": None, "layers_to_transform": None, "lora_alpha": 32, "lora_dropout": 0.05,
    "modules_to_save": None, "peft_type": "LORA", "r": 2, "rank_pattern": {}, "revision": None,
    "target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip
LAYERS = 4


def whole() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        for linear in ("q_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{linear}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, 8, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(6, 2, generator=generator)
    return tensors


def their_key(name: str, adapter: str = "default") -> str:
    piece = 1 + int(name.split(".")[2])
    return f"{piece}." + name.replace(".weight", f".{adapter}.weight")


def write(file, state, config=CONFIG):
    file.parent.mkdir(parents=True, exist_ok=True)
    # The way Merak saves: an OrderedDict, in the format that was torch's before it was a zip archive.
    torch.save(collections.OrderedDict(state), file, _use_new_zipfile_serialization=False)
    (file.parent / "lora_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def stage_of(name: str, pp: int) -> int:
    return int(name.split(".")[2]) * pp // LAYERS


def write_form(folder, form: str, tensors, adapter="default"):
    state = {their_key(name, adapter): tensor for name, tensor in tensors.items()}
    if form == "single":
        write(folder / "lora_model_optim.pt", state)
    elif form == "mp_rank":
        write(folder / "mp_rank_00" / "lora_partial_model_optim.pt", state)
    else:
        for stage in range(4):
            part = {k: t for (k, t), n in zip(state.items(), tensors, strict=True) if stage_of(n, 4) == stage}
            write(folder / f"mp_rank_00_pp_rank_{stage:03d}" / "lora_partial_model_optim.pt", part)


def same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("form", ["single", "mp_rank", "stages"])
@pytest.mark.parametrize("where", ["itself", "tracker"])
def test_every_form_is_read(tmp_path, form, where):
    folder = tmp_path / "2026-11-24_ckpt"
    write_form(folder / "iter_0000020", form, whole(), adapter="mine")
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    found = open_adapter(folder / "iter_0000020" if where == "itself" else folder)
    same(found.tensors, whole())
    assert found.trainer is None and found.optimizer is None
    config = LoraConfig.from_dict(found.lora_config, found.where)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 32, 0.05)
    assert config.target_modules == ("q_proj", "v_proj")


def test_fields_that_merak_does_not_act_on(tmp_path):
    fields = {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 1}, "layers_to_transform": [1]}
    state = {their_key(name): tensor for name, tensor in whole().items()}
    write(tmp_path / "lora_model_optim.pt", state, CONFIG | fields)
    config = LoraConfig.from_dict(open_adapter(tmp_path).lora_config)
    assert (dict(config.rank_pattern), dict(config.alpha_pattern), config.layers_to_transform) == ({}, {}, None)


def test_trained_biases(tmp_path):
    tensors = whole() | {"model.layers.0.self_attn.q_proj.bias": torch.randn(6)}
    state = {their_key(n) if "lora" in n else f"1.{n}": t for n, t in tensors.items()}
    write(tmp_path / "lora_model_optim.pt", state, CONFIG | {"bias": "lora_only"})
    same(open_adapter(tmp_path).tensors, tensors)


def test_tensor_parallel_ranks(tmp_path):
    """Of a column-parallel linear B is cut, of a row-parallel one A; the other factor is the same on all ranks."""
    q, o = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    shapes = {"lora_A": (2, 8), "lora_B": (6, 2)}
    tensors = {f"{linear}.{f}.weight": torch.randn(s) for linear in (q, o) for f, s in shapes.items()}
    for rank in range(2):
        part = dict(tensors)
        part[f"{q}.lora_B.weight"] = tensors[f"{q}.lora_B.weight"].chunk(2, 0)[rank]
        part[f"{o}.lora_A.weight"] = tensors[f"{o}.lora_A.weight"].chunk(2, 1)[rank]
        state = {their_key(name): tensor.clone() for name, tensor in part.items()}
        write(tmp_path / f"mp_rank_{rank:02d}" / "lora_partial_model_optim.pt", state)
    same(open_adapter(tmp_path).tensors, tensors)
    (tmp_path / "mp_rank_00" / "lora_partial_model_optim.pt").unlink()
    with pytest.raises(UserError, match="mp_rank_00/lora_partial_model_optim.pt is missing"):
        open_adapter(tmp_path)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda s: s | {"9.score.weight": torch.zeros(2)}, "9.score.weight is no lora_A, lora_B or bias"),
        (lambda s: s | {"0.embed.lora_embedding_A.default": torch.zeros(2, 2)}, "is no lora_A, lora_B or bias"),
        (lambda s: s | {k.replace("default", "other"): t for k, t in s.items()}, "of two adapters"),
        (lambda s: s | {"args": {"a": 1}}, "is not a flat dict"),
        (lambda s: {i: t for i, t in enumerate(s.values())}, "is not a flat dict"),
    ],
)  # fmt: skip
def test_what_is_not_an_adapter_of_linears(tmp_path, change, match):
    state = change({their_key(name): tensor for name, tensor in whole().items()})
    write(tmp_path / "lora_model_optim.pt", state)
    with pytest.raises(UserError, match=match):
        open_adapter(tmp_path)


def test_stages_that_are_missing_or_twice_there(tmp_path):
    write_form(tmp_path, "stages", whole())
    files = [tmp_path / f"mp_rank_00_pp_rank_00{stage}" / "lora_partial_model_optim.pt" for stage in range(4)]
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(UserError, match="two stages hold model.layers.1"):
        open_adapter(tmp_path)
    files[2].unlink()
    with pytest.raises(UserError, match="pp_rank_002/lora_partial_model_optim.pt is missing"):
        open_adapter(tmp_path)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["lora_model_optim.pt", "mp_rank_00_pp_rank_000/lora_partial_model_optim.pt"])
@pytest.mark.parametrize("form", [pickle.dump, torch.save])
def test_a_hostile_pickle_is_refused(tmp_path, name, form):
    file = tmp_path / "adapter" / name
    write(file, {})
    with file.open("wb") as stream:
        form({"0.q_proj.lora_A.default.weight": Hostile(tmp_path / "owned")}, stream)
    with pytest.raises(UserError, match="cannot be read as tensors and plain values"):
        open_adapter(tmp_path / "adapter")
    assert not (tmp_path / "owned").exists()


def test_our_own_shards_are_not_mistaken(tmp_path):
    tensors = whole()
    save_adapter(tmp_path, tensors, {n: Split(tuple(t.shape)) for n, t in tensors.items()}, Layout(), {"r": 2})
    same(open_adapter(tmp_path).tensors, tensors)
    assert open_adapter(tmp_path).lora_config == {"r": 2}
