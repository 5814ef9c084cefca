"""Files from the net, made up by somebody: the readers of safetensors, of its index and of PEFT's files give what is
there or an error of ours, whatever is in them."""

import json
import math
import shutil

import pytest
import torch
from fuzz import JSON, edited, examples, ours_only
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megalora.adapters.config import LoraConfig
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.peft import write_peft
from megalora.checkpoint.base.hf import INDEX, SINGLE, HfWeights
from megalora.checkpoint.base.weights import BaseNames, open_base
from megalora.checkpoint.manifest import MANIFEST, digest
from megalora.errors import UserError
from megalora.models.spec import FileNames

COMMON = examples(40)
SHAPES = {"model.embed_tokens.weight": (6, 4), "model.layers.0.mlp.up_proj.weight": (8, 4), "model.norm.weight": (4,)}
DEEP = 100_000


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape) for name, shape in SHAPES.items()}


def parts_of(file) -> tuple[dict, bytes]:
    """(header, data) of a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: str | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def read_all(folder) -> None:
    """Every tensor that the folder says it has, whole, as far as it is one of ours."""
    weights = open_base(folder, BaseNames(SHAPES, "model.embed_tokens.weight", "lm_head.weight", False, FileNames()))
    for name, shape in SHAPES.items():
        out = torch.full(shape, float("nan"), dtype=weights.dtype(name))
        weights.copy(name, tuple(slice(0, n) for n in shape), out)
        assert not out.isnan().all(), name


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    (folder / "one").mkdir()
    save_file(tensors(), folder / "one" / SINGLE)
    (folder / "several").mkdir()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors().items()):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensor}, folder / "several" / file)
        weight_map[name] = file
    (folder / "several" / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    linear = "model.layers.0.self_attn.q_proj"
    adapter = {f"{linear}.lora_A.weight": torch.ones(2, 4), f"{linear}.lora_B.weight": torch.ones(8, 2)}
    lora = LoraConfig(r=2, target_modules=("q_proj",), rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4})
    write_peft(folder / "peft", adapter, lora.to_dict(), "some/model")
    shutil.copytree(folder / "peft", folder / "export")
    (folder / "peft" / MANIFEST).unlink()  # of a stranger: without sums, or with sums that he has made
    return folder


def fresh(sound, name, tmp_path):
    shutil.rmtree(tmp_path / name, ignore_errors=True)
    shutil.copytree(sound / name, tmp_path / name)
    return tmp_path / name


def test_the_sound_ones_are_read(sound):
    read_all(sound / "one")
    read_all(sound / "several")
    open_adapter(sound / "peft")
    open_adapter(sound / "export")


@COMMON
@given(data=st.data())
def test_any_header(sound, tmp_path, data):
    folder = fresh(sound, "one", tmp_path)
    header, values = parts_of(folder / SINGLE)
    (folder / SINGLE).write_bytes(join(json.dumps(data.draw(edited(header))), values))
    ours_only(lambda: read_all(folder))


@COMMON
@given(length=st.integers(0, 2**64 - 1) | st.integers(0, 400), keep=st.integers(0, 500))
@example(length=2**63, keep=500)
@example(length=100_000_001, keep=500)
def test_any_length_of_the_header(sound, tmp_path, length, keep):
    folder = fresh(sound, "one", tmp_path)
    header, values = parts_of(folder / SINGLE)
    (folder / SINGLE).write_bytes(join(json.dumps(header), values, length)[:keep])
    ours_only(lambda: read_all(folder))


def change(entry: str, **fields):
    return lambda header: header | {entry: header[entry] | fields}


LIES = {
    "beyond the end": change("model.norm.weight", data_offsets=[224, 2**40], shape=[2**38 - 56]),
    "a little beyond the end": change("model.norm.weight", data_offsets=[228, 244]),
    "backwards": change("model.norm.weight", data_offsets=[240, 224]),
    "below zero": change("model.norm.weight", data_offsets=[-16, 0]),
    "on another": change("model.norm.weight", data_offsets=[0, 16]),
    "shape beyond the bytes": change("model.norm.weight", shape=[400]),
    "shape that overflows": change("model.norm.weight", shape=[2**32, 2**32, 4]),
    "shape below zero": change("model.norm.weight", shape=[-4]),
    "wider dtype": change("model.norm.weight", dtype="F64"),
    "no such dtype": change("model.norm.weight", dtype="F31"),
    "a hole": lambda header: {n: e for n, e in header.items() if n != "model.embed_tokens.weight"},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_about_sizes_is_refused(sound, tmp_path, lie):
    folder = fresh(sound, "one", tmp_path)
    header, values = parts_of(folder / SINGLE)
    assert len(values) == 4 * sum(map(math.prod, SHAPES.values()))
    (folder / SINGLE).write_bytes(join(json.dumps(LIES[lie](header)), values))
    with pytest.raises(UserError, match="is damaged or not safetensors"):
        HfWeights(folder)


@pytest.mark.parametrize("text", ["[" * DEEP, '{"a":' * DEEP, '{"a": 1e999}', '{"__metadata__": 3}', "null", "{}", ""])
def test_strange_json(sound, tmp_path, text):
    """Among others nested deeper than the parser can go, in each file that is JSON."""
    folder = fresh(sound, "one", tmp_path)
    (folder / SINGLE).write_bytes(join(text, b""))
    assert not ours_only(lambda: read_all(folder))
    folder = fresh(sound, "several", tmp_path)
    (folder / INDEX).write_text(text)
    assert not ours_only(lambda: read_all(folder))
    folder = fresh(sound, "peft", tmp_path)
    (folder / "adapter_config.json").write_text(text)
    ours_only(lambda: open_adapter(folder))  # {} is the default of every field
    folder = fresh(sound, "peft", tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(join(text, b""))
    assert not ours_only(lambda: open_adapter(folder))


NAMES = st.sampled_from(
    ["..", ".", "", "/etc/passwd", "../model.safetensors", "a/../model-00001-of-00003.safetensors", "x\0y", "link",
     "model-00001-of-00003.safetensors", "C:\\x", "\ud800", "a" * 300, "sub/link"]
) | st.text(max_size=6)  # fmt: skip


@COMMON
@given(data=st.data())
def test_any_index(sound, tmp_path, data):
    folder = fresh(sound, "several", tmp_path)
    body = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(data.draw(edited(body))))
    ours_only(lambda: read_all(folder))
    (folder / INDEX).write_bytes(data.draw(st.binary(max_size=30)))
    assert not ours_only(lambda: read_all(folder))


@COMMON
@example(name="\ud800", tensor="model.norm.weight")
@given(name=NAMES, tensor=st.sampled_from(list(SHAPES)))
def test_an_index_that_names_any_file(sound, tmp_path, name, tensor):
    """Only a plain name of a file that lies in the folder is opened."""
    folder = fresh(sound, "several", tmp_path)
    outside = tmp_path / "outside.safetensors"
    save_file(tensors(), outside)
    (folder / "link").symlink_to(outside)
    (folder / "sub").mkdir()
    (folder / "sub" / "link").symlink_to(outside)
    body = json.loads((folder / INDEX).read_text())
    before = body["weight_map"][tensor]
    body["weight_map"][tensor] = name
    (folder / INDEX).write_text(json.dumps(body))
    assert ours_only(lambda: read_all(folder)) == (name == before)


@COMMON
@given(data=st.data())
def test_any_adapter_config(sound, tmp_path, data):
    folder = fresh(sound, "peft", tmp_path)
    file = folder / "adapter_config.json"
    body = json.loads(file.read_text())
    if data.draw(st.booleans()):
        fields = st.sampled_from([*body, "use_dora", "lora_bias", "modules_to_save", "target_parameters", "new"])
        body |= data.draw(st.dictionaries(fields, JSON, min_size=1, max_size=3))
    else:
        body = data.draw(edited(body))
    file.write_text(json.dumps(body))
    if data.draw(st.booleans()):
        rename(folder / "adapter_model.safetensors", data.draw(KEYS))

    def read():
        found = open_adapter(folder)
        LoraConfig.from_dict(found.lora_config).resolve("llama", {"model.layers.0.self_attn.q_proj": 0})

    ours_only(read)


LINEAR = "base_model.model.model.layers.0.self_attn.q_proj"
PARTS = ["lora_A", "lora_B", "weight", "bias", "lora_embedding_A", "lora_magnitude_vector", "base_layer", "default",
         "modules_to_save", "original_module", "experts", "0", "17", "lm_head", "embed_tokens", "token_adapter",
         "trainable_tokens_delta", "pooler", "dense", "classifier", "score", "", "model", "layers"]  # fmt: skip
KEYS = st.dictionaries(
    st.integers(0, 1),
    st.lists(st.sampled_from([LINEAR, *PARTS]), min_size=1, max_size=5).map(".".join) | st.text(max_size=4),
    max_size=2,
)


def rename(file, names) -> None:
    """Give tensors of a safetensors file other names, by their numbers."""
    header, values = parts_of(file)
    keys = [key for key in header if key != "__metadata__"]
    new = {keys[number]: name for number, name in names.items()}
    file.write_bytes(join(json.dumps({new.get(key, key): value for key, value in header.items()}), values))


@COMMON
@given(data=st.data())
def test_any_adapter_file(sound, tmp_path, data):
    folder = fresh(sound, "peft", tmp_path)
    file = folder / "adapter_model.safetensors"
    header, values = parts_of(file)
    rename(file, data.draw(KEYS))
    ours_only(lambda: open_adapter(folder))
    file.write_bytes(join(json.dumps(data.draw(edited(header))), values))
    ours_only(lambda: open_adapter(folder))
    file.write_bytes(data.draw(st.binary(max_size=60)))
    assert not ours_only(lambda: open_adapter(folder))


@COMMON
@given(data=st.data())
def test_any_sums_of_an_export(sound, tmp_path, data):
    """Right or not for what they say: whoever writes a folder may write its sums."""
    folder = fresh(sound, "export", tmp_path)
    body = data.draw(edited({k: v for k, v in json.loads((folder / MANIFEST).read_text()).items() if k != "sha256"}))
    if isinstance(body, dict) and data.draw(st.booleans()):
        body = body | {"sha256": digest(body)}
    (folder / MANIFEST).write_text(json.dumps(body))
    ours_only(lambda: open_adapter(folder))
