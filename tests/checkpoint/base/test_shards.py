"""Shards: written at one layout, read at any other, and every way in which some may be missing or damaged."""

import itertools
import json
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from megalora.checkpoint.adapter.shards import CONFIG_FILE, read_adapter, save_adapter
from megalora.checkpoint.base.shards import LAYOUT_FILE, save_base_shards
from megalora.checkpoint.base.weights import BaseNames, load_base, model_fingerprint
from megalora.checkpoint.layout import ADAPTER_FILE, BASE_FILE, Layout
from megalora.errors import UserError
from megalora.models.spec import FileNames
from megalora.parallel.split import Split, shard_range

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
COMMON = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Flat(nn.Module):
    """Parameters under any dotted names, as a stage has them."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.tensors = {name: nn.Parameter(t, requires_grad=False) for name, t in tensors.items()}

    def named_parameters(self, *args, **kwargs):
        return iter(self.tensors.items())


def cut(shape: tuple[int, ...], dim: int | None, parts: int, overlap: int, tp: int, tp_rank: int) -> Split:
    """A split in `parts` parts, each on tp / parts ranks, that reach `overlap` into their neighbours."""
    if dim is None or parts == 1:
        return Split(shape)
    start, stop = shard_range(shape[dim], tp_rank * parts // tp, parts)
    return Split.range(shape, dim, max(0, start - overlap), min(shape[dim], stop + overlap))


@st.composite
def models(draw):
    """Some parameters: {name: (shape, dim that is cut or None, most parts, overlap)}."""
    parameters = {}
    for i in range(draw(st.integers(1, 5))):
        dim = draw(st.sampled_from([None, 0, 1]))
        most = draw(st.sampled_from([1, 2, 4]))
        shape = [draw(st.integers(1, 4)) * 4, draw(st.integers(1, 4)) * 4]
        if dim is not None and most == 4:
            shape[dim] += draw(st.integers(0, 3))  # a vocabulary that tp does not divide
        # KV heads fewer than tp are on several ranks; where tp does not divide the heads, parts overlap.
        parameters[f"model.layers.{i}.w.weight"] = (tuple(shape), dim, most, draw(st.integers(0, 2)))
    return parameters


LAYOUTS = st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 3))


def splits_at(model: dict, tp: int, pp: int, tp_rank: int, pp_rank: int) -> dict[str, Split]:
    first, last = shard_range(len(model), pp_rank, pp)
    return {
        name: cut(shape, dim, min(most, tp), overlap, tp, tp_rank)
        for name, (shape, dim, most, overlap) in list(model.items())[first:last]
    }


def ranks(tp: int, pp: int):
    return [Layout(tp, pp, t, p) for p, t in itertools.product(range(pp), range(tp))]


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    return folder


# ---- base ----


@COMMON
@given(models(), LAYOUTS, LAYOUTS, st.integers(1, 400), st.booleans())
def test_base_written_at_one_layout_loads_at_any_other(tmp_path, monkeypatch, model, old, new, mapped, say_where):
    monkeypatch.setattr("megalora.checkpoint.base.shards.MAPPED_BYTES", mapped)
    folder = fresh(tmp_path / "shards")
    tensors = {name: torch.randn(shape).bfloat16() for name, (shape, *_) in model.items()}
    expected = {name: shape for name, (shape, *_) in model.items()}
    for at in ranks(*old):
        splits = splits_at(model, at.tp, at.pp, at.tp_rank, at.pp_rank)
        save_base_shards(folder, Flat({n: s.slice(tensors[n]) for n, s in splits.items()}), splits, at)
        if not say_where and not any(overlap for *_, overlap in model.values()):
            (folder / at.folder / LAYOUT_FILE).unlink()
    for at in ranks(*new):
        splits = splits_at(model, at.tp, at.pp, at.tp_rank, at.pp_rank)
        stage = Flat({n: torch.full(s.local_shape, float("nan")) for n, s in splits.items()})
        load_base(stage, folder, splits=splits, names=names_of(expected))
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, splits[name].slice(tensors[name]).float()), name


def names_of(expected) -> BaseNames:
    return BaseNames(expected, "model.embed_tokens.weight", "lm_head.weight", False, FileNames())


SHAPES = {"model.embed_tokens.weight": (10, 4), "model.layers.0.w.weight": (4, 8), "model.norm.weight": (4,)}
MODEL = {name: (shape, [0, 1, None][i], 4, 0) for i, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture
def base(tmp_path):
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    for at in ranks(2, 1):
        splits = splits_at(MODEL, 2, 1, at.tp_rank, 0)
        parts = {n: s.slice(tensors[n]) for n, s in splits.items()}
        adapter = {"model.layers.0.w.lora_A.weight": torch.zeros(1)}  # is no part of the base
        save_base_shards(tmp_path / "shards", Flat(parts | adapter), splits, at)
    return tmp_path / "shards"


def load(folder, expected=SHAPES):
    stage = Flat({n: torch.empty(s) for n, s in SHAPES.items()})
    load_base(stage, folder, splits={n: Split(s) for n, s in SHAPES.items()}, names=names_of(expected))


def test_base_shard_is_a_flat_dict_of_parts(base):
    file = base / "mp_rank_01_pp_rank_000" / BASE_FILE
    state = torch.load(file, weights_only=True)
    assert {n: list(t.shape) for n, t in state.items()} == {
        "model.embed_tokens.weight": [5, 4],
        "model.layers.0.w.weight": [4, 4],
        "model.norm.weight": [4],
    }


def test_fingerprint_does_not_depend_on_the_form(base):
    assert model_fingerprint(base, names_of(SHAPES)) == model_fingerprint(base.parent, names_of(SHAPES))


def test_base_shards_that_do_not_make_up_the_model(base):
    with pytest.raises(UserError, match=r"model.norm.weight has shape \[4\], .*means \[5, 1\]"):
        load(base, SHAPES | {"model.norm.weight": (5, 1)})
    with pytest.raises(UserError, match="lacks model.other"):
        load(base, SHAPES | {"model.other": (5,)})
    (base / "mp_rank_00_pp_rank_000" / LAYOUT_FILE).write_text("{}")
    with pytest.raises(UserError, match="rank_000/layout.json: does not say where"):
        load(base)


def test_missing_base_shard_is_named(base):
    shutil.rmtree(base / "mp_rank_01_pp_rank_000")
    with pytest.raises(UserError, match="mp_rank_01_pp_rank_000 is missing of 2 x 1"):
        load(base)
    shutil.rmtree(base / "mp_rank_00_pp_rank_000")
    with pytest.raises(UserError, match="holds neither"):
        load(base)


def test_base_shards_that_do_not_say_where_they_lie(base):
    for file in base.rglob(LAYOUT_FILE):
        file.unlink()
    load(base)
    for shape in [(4, 12), (5, 9), (4,)]:
        with pytest.raises(UserError, match=r"model.layers.0.w.weight has shapes \[\[4, 4\], \[4, 4\]\]"):
            load(base, SHAPES | {"model.layers.0.w.weight": shape})
    shutil.rmtree(base / "mp_rank_01_pp_rank_000")
    with pytest.raises(UserError, match="copy all shards"):
        load(base)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 100, [1, 2], {"a": 1}, pickle.dumps(Hostile())],
    ids=["empty", "zeros", "list", "no tensors", "hostile"],
)
def test_damaged_base_shard_is_named(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = base / "mp_rank_01_pp_rank_000" / BASE_FILE
    file.write_bytes(data) if isinstance(data, bytes) else torch.save(data, file)
    with pytest.raises(UserError, match=f"mp_rank_01_pp_rank_000/{BASE_FILE}"):
        load(base)
    assert not (tmp_path / "owned").exists()


def test_hostile_pickle_in_torchs_own_container_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Hostile()}, base / "mp_rank_01_pp_rank_000" / BASE_FILE)
    with pytest.raises(UserError, match="cannot be read as tensors and plain values"):
        load(base)
    assert not (tmp_path / "owned").exists()


# ---- adapters ----


def write_adapter(folder, model, tensors, layout, optimizer=True, trainer=None):
    for at in ranks(*layout):
        splits = splits_at(model, at.tp, at.pp, at.tp_rank, at.pp_rank)
        parts = {n: s.slice(tensors[n]) for n, s in splits.items()}
        moments = {n: {"exp_avg": t + 1, "exp_avg_sq": t * t} for n, t in parts.items()}
        save_adapter(folder, parts, splits, at, LORA, moments if optimizer else None, trainer)


@COMMON
@given(models(), LAYOUTS, st.booleans())
def test_adapter_is_whole_whatever_layout_wrote_it(tmp_path, model, layout, optimizer):
    folder = fresh(tmp_path / "adapter")
    tensors = {name: torch.randn(shape) for name, (shape, *_) in model.items()}
    trainer = {"step": 7, "scale": 65536.0, "best": float("nan"), "history": [1, "a"]}
    write_adapter(folder, model, tensors, layout, optimizer, trainer)
    found = read_adapter(folder)
    assert found.lora_config == LORA and repr(found.trainer) == repr(trainer)
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[n], t) for n, t in tensors.items())
    assert (found.optimizer is not None) == optimizer
    for name, state in (found.optimizer or {}).items():
        assert torch.equal(state["exp_avg"], tensors[name] + 1)
        assert torch.equal(state["exp_avg_sq"], tensors[name] * tensors[name])


@pytest.fixture
def adapter(tmp_path):
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    write_adapter(tmp_path / "adapter", MODEL, tensors, (2, 2))
    return tmp_path / "adapter"


def test_adapter_folders_have_the_documented_names(adapter):
    files = {str(f.relative_to(adapter)) for f in adapter.rglob("*") if f.is_file()}
    assert files == {
        f"mp_rank_0{t}_pp_rank_00{p}/{name}"
        for t, p, name in itertools.product((0, 1), (0, 1), (ADAPTER_FILE, CONFIG_FILE))
    }
    shard = torch.load(adapter / "mp_rank_00_pp_rank_001" / ADAPTER_FILE, weights_only=True)
    assert list(shard["model"]) == ["model.layers.0.w.weight", "model.norm.weight"]
    # A part is saved alone, not with the whole that it is a view of.
    assert shard["model"]["model.layers.0.w.weight"].untyped_storage().nbytes() == 4 * 4 * 4


@pytest.mark.parametrize("gone", [f"mp_rank_0{t}_pp_rank_00{p}" for t in (0, 1) for p in (0, 1)])
def test_missing_adapter_shard_is_named(adapter, gone):
    shutil.rmtree(adapter / gone)
    with pytest.raises(UserError, match=f"{gone} is missing of 2 x 2"):
        read_adapter(adapter)


def test_other_damage_to_adapters_is_named(adapter):
    first, second = adapter / "mp_rank_00_pp_rank_000", adapter / "mp_rank_01_pp_rank_000"
    (first / ADAPTER_FILE).rename(first / "aside")
    with pytest.raises(UserError, match=f"{first.name}/{ADAPTER_FILE} is missing"):
        read_adapter(adapter)
    shutil.copy(second / ADAPTER_FILE, first / ADAPTER_FILE)
    with pytest.raises(UserError, match=f"{first.name} was written as {second.name}"):
        read_adapter(adapter)
    shutil.copy(first / "aside", first / ADAPTER_FILE)
    (first / CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match=f"{first.name}/{CONFIG_FILE}: is not JSON"):
        read_adapter(adapter)
    with pytest.raises(UserError, match="holds no mp_rank"):
        read_adapter(adapter / "absent")


def test_shards_of_two_checkpoints_are_not_mixed(adapter, tmp_path):
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    write_adapter(tmp_path / "later", MODEL, tensors, (2, 2), trainer={"step": 9})
    name = f"mp_rank_01_pp_rank_001/{ADAPTER_FILE}"
    shutil.copy(tmp_path / "later" / name, adapter / name)
    with pytest.raises(UserError, match="of another checkpoint than its neighbours"):
        read_adapter(adapter)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_payload_gives_an_adapter_or_our_error(tmp_path, data):
    folder = fresh(tmp_path / "adapter")
    tensors = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    write_adapter(folder, MODEL, tensors, (1, 1), trainer={"step": 1})
    file = folder / "mp_rank_00_pp_rank_000" / ADAPTER_FILE
    payload = torch.load(file, weights_only=True)
    place = payload
    for _ in range(data.draw(st.integers(0, 3))):
        keys = [k for k, v in place.items() if isinstance(v, dict) and v]
        if not keys:
            break
        place = place[data.draw(st.sampled_from(keys))]
    place[data.draw(st.sampled_from(list(place)))] = data.draw(JUNK)
    torch.save(payload, file)
    try:
        read_adapter(folder)
    except UserError as error:
        assert "\n" not in str(error)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=JUNK)
def test_any_config_gives_an_object_or_our_error(adapter, config):
    file = adapter / "mp_rank_00_pp_rank_000" / CONFIG_FILE
    file.write_text(json.dumps(config))
    try:
        assert read_adapter(adapter).lora_config == config
    except UserError:
        assert not isinstance(config, dict)
    except AssertionError:
        assert "nan" in repr(config).lower()
