"""Base weights from an HF folder: every layout's slices, damage of each kind, and the memory it takes."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peak_memory import growth
from safetensors.torch import save_file
from spawn import spawn
from torch import nn

from megalora.checkpoint.base import hf
from megalora.checkpoint.base.shards import save_base_shards
from megalora.checkpoint.base.weights import BaseNames, load_base, model_fingerprint
from megalora.checkpoint.layout import Layout
from megalora.errors import UserError
from megalora.models.spec import FileNames
from megalora.parallel.split import Split

SHAPES = {
    "model.embed_tokens.weight": (11, 4),
    "model.layers.0.self_attn.q_proj.weight": (8, 4),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.self_attn.o_proj.weight": (4, 8),
    "model.norm.weight": (4,),
    "lm_head.weight": (11, 4),
}


def make_module(splits: dict[str, Split], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tree of modules with one uninitialised parameter a name, as a stage has them."""
    root = nn.Module()
    for name, split in splits.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        value = torch.full(split.local_shape, float("nan"), dtype=dtype)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=leaf == "bias"))
    return root


def whole(shapes: dict) -> dict[str, Split]:
    return {name: Split(shape) for name, shape in shapes.items()}


def make_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def write_sharded(folder, tensors: dict[str, torch.Tensor]) -> None:
    names = sorted(tensors)
    files = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def names_of(expected, tied: bool = False) -> BaseNames:
    return BaseNames(expected, "model.embed_tokens.weight", "lm_head.weight", tied, FileNames())


def load(folder, tied=False, splits=None, expected=None, dtype=torch.float32) -> dict[str, torch.Tensor]:
    splits = splits or whole(SHAPES)
    module = make_module(splits, dtype)
    expected = expected or {n: s for n, s in SHAPES.items() if not (tied and n == "lm_head.weight")}
    load_base(module, folder, splits=splits, names=names_of(expected, tied))
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.fixture
def folder(tmp_path):
    save_file(make_tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_slices_of_either_form_in_every_dtype(tmp_path, sharded, dtype):
    tensors = make_tensors(dtype)
    write_sharded(tmp_path, tensors) if sharded else save_file(tensors, tmp_path / "model.safetensors")
    splits = whole(SHAPES) | {
        "model.embed_tokens.weight": Split.range((11, 4), 0, 5, 11),
        "model.layers.0.self_attn.q_proj.weight": Split.range((8, 4), 0, 2, 4),
        "model.layers.0.self_attn.q_proj.bias": Split.range((8,), 0, 2, 4),
        "model.layers.0.self_attn.o_proj.weight": Split.range((4, 8), 1, 2, 4),
    }
    del splits["lm_head.weight"]  # another stage's
    for name, value in load(tmp_path, splits=splits).items():
        assert torch.equal(value, splits[name].slice(tensors[name]).float()), name


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_slice_over_several_blocks(tmp_path, monkeypatch, data):
    monkeypatch.setattr("megalora.checkpoint.base.hf.BLOCK_BYTES", data.draw(st.integers(1, 300)))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dim = data.draw(st.sampled_from([None, *range(len(shape))]))
    start = stop = 0
    if dim is not None:
        start = data.draw(st.integers(0, shape[dim] - 1))
        stop = data.draw(st.integers(start + 1, shape[dim]))
    tensor = torch.randn(shape)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    split = Split.range(shape, dim, start, stop)
    assert torch.equal(load(tmp_path, splits={"w": split}, expected={"w": shape})["w"], split.slice(tensor))


def test_leaves_adapters_alone(folder):
    splits = whole(SHAPES) | {"model.layers.0.self_attn.q_proj.lora_A.weight": Split((2, 4))}
    assert load(folder, splits=splits)["model.layers.0.self_attn.q_proj.lora_A.weight"].isnan().all()


@pytest.mark.parametrize("present", [False, True])
def test_tied_head_is_the_embedding(tmp_path, present):
    tensors = make_tensors()
    if not present:
        del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load(tmp_path, tied=True, splits={"lm_head.weight": Split.range((11, 4), 0, 3, 7)})
    assert torch.equal(loaded["lm_head.weight"], tensors["model.embed_tokens.weight"][3:7])


def test_values_that_are_not_finite_are_counted(tmp_path):
    """Of what a rank reads; so too a value that is finite in the file and not in the dtype that it is read into."""
    tensors = make_tensors()
    tensors["model.embed_tokens.weight"][2] = torch.nan
    tensors["model.norm.weight"][0] = -torch.inf
    tensors["model.norm.weight"][1] = 1e30
    save_file(tensors, tmp_path / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"].shape[1]
    for dtype, norms in ((torch.float32, 1), (torch.float16, 2)):
        splits = whole(SHAPES)
        said = load_base(make_module(splits, dtype), tmp_path, splits=splits, names=names_of(SHAPES))
        assert sorted(line.partition(".safetensors: ")[2] for line in said) == [
            f"model.embed_tokens.weight: {rows:,} values are not finite: what reads them gives NaN",
            f"model.norm.weight: {norms} values are not finite: what reads them gives NaN",
        ]


def test_other_names_of_a_file_are_read(tmp_path):
    """A bare model lacks the prefix; a head may have another name; two names of one tensor are refused."""
    tensors = make_tensors()
    bare = {name.removeprefix("model.").replace("lm_head.", "embed_out."): t for name, t in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    names = BaseNames(
        SHAPES, "model.embed_tokens.weight", "lm_head.weight", False,
        FileNames(renames=(("embed_out.", "lm_head."),), prefix="model."),
    )  # fmt: skip
    splits = whole(SHAPES)
    module = make_module(splits, torch.float32)
    load_base(module, tmp_path, splits=splits, names=names)
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in module.named_parameters())
    save_file(bare | {"lm_head.weight": tensors["lm_head.weight"].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="two names of one tensor"):
        load_base(module, tmp_path, splits=splits, names=names)


def test_ignores_rotary_buffers(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(make_tensors() | extra, tmp_path / "model.safetensors")
    load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), ["lacks model.norm.weight", "config.json"]),
        (lambda t: t.update({"model.layers.1.x": torch.ones(1)}), ["unexpected model.layers.1.x"]),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(5)}),
            ["model.safetensors", "model.norm.weight", "[5]", "[4]"],
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(4, dtype=torch.int8)}), ["I8", "BF16"]),
    ],
)
def test_weights_of_another_model(tmp_path, change, words):
    tensors = make_tensors()
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    # A rank that holds none of the parameters at fault must stop too.
    with pytest.raises(UserError) as error:
        load(tmp_path, splits={"model.embed_tokens.weight": Split((11, 4))}, expected=SHAPES)
    assert all(word in str(error.value) for word in words), error.value


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def lying_header(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"shape":[4,8]', b'"shape":[4,9]'))


def use_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "model.safetensors: is damaged"),
        (lying_header, "model.safetensors: is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors: is damaged"),
        (use_pickle, "pickle: convert it"),
        (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (
            lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
            "lacks model.saf",
        ),
    ],
)
def test_damage_is_named(folder, damage, words):
    damage(folder)
    with pytest.raises(UserError, match=words):
        load(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: "{", "is not JSON"),
        (lambda text: "[]", "holds a list"),
        (lambda text: "{}", "weight_map must"),
        (lambda text: '{"weight_map": {}}', "weight_map must"),
        (lambda text: '{"weight_map": {"a": 3}}', "weight_map must"),
        (lambda text: text.replace("model-00001", "../model-00001"), "no file of the folder"),
        (lambda text: text.replace("model-00001", "/etc/model-00001"), "no file of the folder"),
        (lambda text: text.replace("model-00001", "model-00003"), "does not exist"),
        (lambda text: text.replace("lm_head.weight", "lm_tail.weight"), "lacks lm_tail.weight"),
    ],
)
def test_broken_index(tmp_path, edit, words):
    write_sharded(tmp_path, make_tensors())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(edit(index.read_text()))
    with pytest.raises(UserError, match=words):
        load(tmp_path)


def test_links_lead_only_into_the_hubs_cache(tmp_path):
    snapshot, blobs, outside = tmp_path / "snapshots" / "abc", tmp_path / "blobs", tmp_path / "outside"
    for made in (snapshot, blobs, outside):
        made.mkdir(parents=True)
    write_sharded(snapshot, make_tensors())
    file = snapshot / "model-00001-of-00002.safetensors"
    file.rename(blobs / "1234")
    file.symlink_to(os.path.join("..", "..", "blobs", "1234"))
    load(snapshot)
    (blobs / "1234").rename(outside / "1234")
    file.unlink()
    file.symlink_to(outside / "1234")
    with pytest.raises(UserError, match="link out of the folder"):
        load(snapshot)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 400), new=st.binary(min_size=1, max_size=8))
def test_any_header_gives_weights_or_our_error(folder, at, new):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[at : at + len(new)] = new
    other = folder / "other"
    other.mkdir(exist_ok=True)
    (other / "model.safetensors").write_bytes(data)
    try:
        load(other)
    except UserError:
        pass


def test_fingerprint_sees_names_shapes_dtypes_and_values(folder, tmp_path):
    names = names_of(SHAPES)
    first = model_fingerprint(folder, names)
    assert model_fingerprint(folder, names) == first
    seen = {first}
    for i, change in enumerate(
        [
            lambda t: t["model.norm.weight"].add_(1e-6),
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].double()}),
        ]
    ):
        tensors = make_tensors()
        change(tensors)
        other = tmp_path / str(i)
        other.mkdir()
        save_file(tensors, other / "model.safetensors")
        seen.add(model_fingerprint(other, names))
    assert len(seen) == 3


# ---- memory ----

@pytest.fixture(scope="module")
def big_folder(tmp_path_factory):
    """Five bf16 tensors of 96 MB: 480 MB in one file, as safetensors in hf/ and as a shard in shards/."""
    folder = tmp_path_factory.mktemp("big")
    (folder / "hf").mkdir()
    tensors = {f"model.w{i}": torch.full((24_000, 2_000), float(i), dtype=torch.bfloat16) for i in range(5)}
    save_file(tensors, folder / "hf" / "model.safetensors")
    module = nn.Module()
    module.model = nn.ParameterDict({f"w{i}": nn.Parameter(t, False) for i, t in enumerate(tensors.values())})
    save_base_shards(folder / "shards", module, whole(dict.fromkeys(tensors, (24_000, 2_000))), Layout())
    yield folder
    shutil.rmtree(folder)


def loaded(rank: int, world_size: int, folder: Path, dim: int) -> int:
    """By how many bytes the peak of a process grows that loads a quarter of each tensor."""
    shape = (24_000, 2_000)
    split = Split.range(shape, dim, 0, shape[dim] // 4)
    module = nn.Module()
    module.model = nn.ParameterDict(
        {f"w{i}": nn.Parameter(torch.empty(split.local_shape, dtype=torch.bfloat16), False) for i in range(5)}
    )
    names = [name for name, _ in module.named_parameters()]
    expected = BaseNames(
        dict.fromkeys(names, shape), "model.embed_tokens.weight", "lm_head.weight", False, FileNames()
    )
    grown = growth(lambda: load_base(module, folder, splits=dict.fromkeys(names, split), names=expected))
    assert all(bool((p == i).all()) for i, p in enumerate(module.parameters()))
    return grown


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("form", "spare"), [("hf", 16), ("shards", 64)])
def test_peak_memory_is_the_slice_and_little_more(big_folder, form, spare, dim):
    megabyte = 1 << 20
    tensor = 24_000 * 2_000 * 2
    own, largest = 5 * tensor // 4, tensor // 4
    (grown,) = spawn(loaded, 1, big_folder / form, dim)
    print(f"growth {grown / megabyte:.0f} MB, own slice {own / megabyte:.0f} MB")
    assert grown <= own + largest + 300 * megabyte
    # Tighter than promised: its own slice, a buffer (for shards, of mapped pages), and what torch sets up.
    assert grown <= own + (spare + 24) * megabyte


def test_an_index_of_many_names_looks_at_each_file_once(tmp_path, monkeypatch):
    write_sharded(tmp_path, make_tensors())
    index = tmp_path / hf.INDEX
    fields = json.loads(index.read_text())
    fields["weight_map"] |= {f"x{i}": "model-00001-of-00002.safetensors" for i in range(10**4)}
    index.write_text(json.dumps(fields))
    looked, check = [], hf.check_stays
    monkeypatch.setattr(hf, "check_stays", lambda folder, file: looked.append(file) or check(folder, file))
    with pytest.raises(UserError, match="lacks x"):
        load(tmp_path)
    assert len(looked) == 2


def test_an_index_is_refused_by_its_size(tmp_path):
    write_sharded(tmp_path, make_tensors())
    with (tmp_path / hf.INDEX).open("r+b") as file:
        file.truncate(hf.INDEX_BYTES + 1)
    with pytest.raises(UserError, match="is larger than 67,108,864 bytes"):
        load(tmp_path)


def test_a_pipe_for_weights_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / hf.SINGLE)
    with pytest.raises(UserError, match="model.safetensors: is not a regular file"):
        load(tmp_path)


@pytest.mark.parametrize("prefix", ["language_model.", "base_model.model."])
def test_a_wrong_prefix_is_named(tmp_path, prefix):
    save_file({prefix + name: tensor for name, tensor in make_tensors().items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"holds {prefix}model.* where the model has model.*another prefix"):
        load(tmp_path)
