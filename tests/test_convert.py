"""`megalora convert`: bit-exact both ways, everything checked first, nothing left by a failure, little memory."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest
import tiny
import torch
from oracle import FAMILIES, MODERN, TINY
from peak_memory import growth
from safetensors.torch import load_file, save_file
from spawn import spawn
from told import user_error

from megalora import cli
from megalora.building import base_names, load_base_weights, stage_layers
from megalora.checkpoint.base.shards import save_base_shards
from megalora.checkpoint.base.weights import model_fingerprint
from megalora.checkpoint.layout import BASE_FILE, Layout
from megalora.models.config import read_config
from megalora.models.stage import Stage
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits

LAYOUTS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 4)]
BESIDE = {
    "generation_config.json": "{}",
    "tokenizer.json": '{"a": 1}',
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "free",
}


def run(capsys, *words: object) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main(["convert", *map(str, words)])
    told = capsys.readouterr()
    return status, told.out + told.err


def done(capsys, *words: object) -> str:
    status, told = run(capsys, *words)
    assert status == 0, told
    return told


def refused(capsys, match: str, *words: object) -> None:
    status, told = run(capsys, *words)
    assert status == 2 and match in user_error(told), told


def make(folder, family: str = "llama", files: int = 1, dtype: torch.dtype = torch.bfloat16, extra=(), **fields):
    """An HF folder of random weights, the norms in float32, in one file or several."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY | (FAMILIES | MODERN)[family] | fields))
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    shapes = read_config(folder).tensors | dict(extra)
    generator = torch.Generator().manual_seed(len(shapes))
    tensors = {
        name: torch.randn(shape, generator=generator).to(torch.float32 if "norm" in name else dtype)
        for name, shape in shapes.items()
    }
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[number::files])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def sums(folder) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """SHA-256, shape and dtype of each tensor of an HF folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert name not in found
            digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            found[name] = (digest, tuple(tensor.shape), str(tensor.dtype))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips_are_exact(tmp_path, capsys, family):
    """tp 4 is more than the KV heads of qwen2; each layout is of one file or three, tied or not, by turns."""
    sources = {
        (files, tied): make(tmp_path / f"hf{files}{tied}", family, files, tie_word_embeddings=tied)
        for files in (1, 3)
        for tied in (False, True)
    }
    for number, (tp, pp) in enumerate(LAYOUTS):
        files, tied = (1, 3)[number % 2], bool(number // 2 % 2)
        source, shards, back = sources[files, tied], tmp_path / f"shards{number}", tmp_path / f"back{number}"
        layout = ["--tensor_parallel_size", tp, "--pipeline_parallel_size", pp]
        done(capsys, "to-shards", "--input", source, "--output", shards, *layout)
        # 8 kB: some files have one tensor, some several; 5 GB: one file
        size = [] if files == 1 else ["--max_shard_size", 8e-6]
        done(capsys, "to-hf", "--input", shards, "--output", back, *size)
        assert sums(back) == sums(source)
        assert (back / "model.safetensors.index.json").exists() == (files == 3)
        for name, text in BESIDE.items():
            assert (back / name).read_text() == text and (shards / name).read_text() == text
        assert (back / "config.json").read_text() == (source / "config.json").read_text()
        assert len(list(shards.glob("mp_rank_*"))) == tp * pp


def test_numbers_that_a_layer_has_go_to_shards_and_back(tmp_path, capsys):
    """Those of Apertus' activation: no rows, which are what all else is read and written by."""
    source = make(tmp_path / "hf", "apertus")
    done(capsys, "to-shards", "--input", source, "--output", tmp_path / "shards", "--tensor_parallel_size", 2)
    done(capsys, "to-hf", "--input", tmp_path / "shards", "--output", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)
    config = read_config(source)
    names = base_names(config)
    assert model_fingerprint(source, names) == model_fingerprint(tmp_path / "shards", names)
    for rank in range(2):
        place = Placement(Axis(rank, (0, 1)), False, torch.bfloat16, "cpu")
        read = [Stage(config, range(4), place) for _ in range(2)]
        for stage, folder in zip(read, (source, tmp_path / "shards"), strict=True):
            load_base_weights(stage, folder)
        ours, theirs = (dict(stage.named_parameters()) for stage in read)
        assert ours["model.layers.1.mlp.act_fn.eps"].shape == () and len(ours) == len(theirs)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 1},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8},
        {"tie_word_embeddings": True, "vocab_size": 130},
    ],
    ids=["one KV head", "heads that tp does not divide", "tied"],
)
def test_shards_are_those_of_a_stage(tmp_path, capsys, fields):
    """What the converter writes is what each rank of a run would hold and write."""
    source = make(tmp_path / "hf", dtype=torch.float32, **fields)
    uneven = ["--uneven_heads"] if fields.get("num_attention_heads") == 6 else []
    words = ["--tensor_parallel_size", 4, "--pipeline_parallel_size", 2, "--partition_method", "custom"]
    done(
        capsys, "to-shards", "--input", source, "--output", tmp_path / "ours", *words, *uneven,
        "--custom_partition", 3, 1,
    )  # fmt: skip
    config = read_config(source)
    layers = stage_layers(config, 2, "custom", (3, 1))
    for pp_rank in range(2):
        for tp_rank in range(4):
            place = Placement(Axis(tp_rank, tuple(range(4))), False, torch.float32, "cpu")
            stage = Stage(config, layers[pp_rank], place, first=pp_rank == 0, last=pp_rank == 1)
            load_base_weights(stage, source)
            at = Layout(4, 2, tp_rank, pp_rank)
            save_base_shards(tmp_path / "theirs", stage, named_splits(stage), at)
            ours, theirs = (
                torch.load(tmp_path / whose / at.folder / BASE_FILE, weights_only=True) for whose in ("ours", "theirs")
            )
            if config.tie_word_embeddings:  # a run keeps its copy of the head, which the HF file does not hold
                theirs.pop("lm_head.weight", None)
            assert ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                assert torch.equal(tensor, theirs[name]), name


def test_reshard(tmp_path, capsys):
    source = make(tmp_path / "hf", "qwen2", files=3)
    before, step = tmp_path / "hf", 0
    for tp, pp, method in ((4, 1, "uniform"), (1, 4, "uniform_floor"), (2, 3, "parameters")):
        step += 1
        command = "reshard" if step > 1 else "to-shards"
        layout = ["--tensor_parallel_size", tp, "--pipeline_parallel_size", pp, "--partition_method", method]
        done(capsys, command, "--input", before, "--output", tmp_path / str(step), *layout)
        before = tmp_path / str(step)
    done(capsys, "to-hf", "--input", before, "--output", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)
    refused(capsys, "use to-shards", "reshard", "--input", source, "--output", tmp_path / "x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes_are_kept(tmp_path, capsys, dtype):
    source = make(tmp_path / "hf", dtype=dtype)
    done(capsys, "to-shards", "--input", source, "--output", tmp_path / "shards", "--tensor_parallel_size", 2)
    done(capsys, "to-hf", "--input", tmp_path / "shards", "--output", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


def test_what_old_files_hold_beside_the_weights_is_kept(tmp_path, capsys):
    """A head in the file of a tied model, and rotary frequencies."""
    extra = {"lm_head.weight": (131, 48), "model.layers.2.self_attn.rotary_emb.inv_freq": (3,)}
    source = make(tmp_path / "hf", "qwen2", extra=extra)
    layout = ["--tensor_parallel_size", 2, "--pipeline_parallel_size", 2]
    done(capsys, "to-shards", "--input", source, "--output", tmp_path / "shards", *layout)
    done(capsys, "to-hf", "--input", tmp_path / "shards", "--output", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source) and "lm_head.weight" in sums(source)


def test_transformers_loads_what_is_written(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    source = tiny.save_model(tmp_path / "hf")
    done(capsys, "to-shards", "--input", source, "--output", tmp_path / "shards", "--tensor_parallel_size", 2)
    done(capsys, "to-hf", "--input", tmp_path / "shards", "--output", tmp_path / "back", "--max_shard_size", 5e-5)
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (source, tmp_path / "back"))
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ---- checked before anything is written ----


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    source = make(tmp_path / "hf")
    layout = ["--tensor_parallel_size", 2, "--pipeline_parallel_size", 2]
    told = done(capsys, "to-shards", "--input", source, "--output", tmp_path / "out", *layout, "--dry_run")
    assert "mp_rank_01_pp_rank_001/partial_model_optim.pt" in told and "nothing was written" in told
    assert "tokenizer.json" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    refused(capsys, "does not divide", "to-shards", "--input", source, "--output", tmp_path / "out", "--dry_run",
            "--tensor_parallel_size", 3)  # fmt: skip


def test_a_model_that_is_not_whole(tmp_path, capsys):
    source = make(tmp_path / "hf", files=3)
    words = ["to-shards", "--input", source, "--output", tmp_path / "out"]
    (source / "model-00002-of-00003.safetensors").rename(tmp_path / "gone")
    refused(capsys, "model-00002-of-00003.safetensors", *words)
    (tmp_path / "gone").rename(source / "model-00002-of-00003.safetensors")
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 5}))
    refused(capsys, "lacks model.layers.4", *words)
    (source / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 3}))
    refused(capsys, "holds the unexpected model.layers.3", *words)
    (source / "config.json").write_text(json.dumps(fields | {"intermediate_size": 81}))
    refused(capsys, "has shape", *words)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_missing_or_cut_short(tmp_path, capsys):
    source = make(tmp_path / "hf")
    done(capsys, "to-shards", "--input", source, "--output", tmp_path / "shards", "--tensor_parallel_size", 2)
    words = ["to-hf", "--input", tmp_path / "shards", "--output", tmp_path / "out"]
    file = tmp_path / "shards" / "mp_rank_01_pp_rank_000" / BASE_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(capsys, "mp_rank_01_pp_rank_000/partial_model_optim.pt", *words)
    file.unlink()
    refused(capsys, "mp_rank_01_pp_rank_000", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "shards"]


def test_an_existing_target(tmp_path, capsys):
    source = make(tmp_path / "hf")
    words = ["to-shards", "--input", source, "--output", tmp_path / "out"]
    done(capsys, *words)
    refused(capsys, "--overwrite true", *words)
    refused(capsys, "which is read", "to-hf", "--input", tmp_path / "out", "--output", tmp_path / "out", "--overwrite")
    done(capsys, *words, "--tensor_parallel_size", 2, "--overwrite", "true")
    assert len(list((tmp_path / "out").glob("mp_rank_*"))) == 2


def test_a_disk_that_fills_leaves_nothing(tmp_path, capsys, monkeypatch):
    from megalora.checkpoint.base import streams

    source = make(tmp_path / "hf")
    written = 0

    def full(stream, data):
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(28, "No space left on device")
        stream.write(data)

    done(capsys, "to-shards", "--input", source, "--output", tmp_path / "shards")
    monkeypatch.setattr(streams, "_write_all", full)
    refused(capsys, "No space left", "to-hf", "--input", tmp_path / "shards", "--output", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "shards"]


@pytest.mark.parametrize(
    "words, match",
    [
        ([], "convert needs a command"),
        (["to-shard"], "unknown command convert to-shard"),
        (["to-hf"], "--input and --output must be given"),
        (["to-hf", "--input", "a", "--output", "b", "--tensor_parallel_size", "2"], "belongs to megalora convert"),
        (["to-shards", "--input", "a", "--output", "b", "--custom_partition", "2"], "has no effect"),
        (["to-shards", "--input", "nowhere", "--output", "b"], "input nowhere does not exist"),
        (["to-hf", "--input", "a", "--output", "b", "--max_shard_size", "0"], "give a number above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(capsys, words, match):
    refused(capsys, match, *words)


def test_help(capsys):
    assert "to-shards" in done(capsys, "--help")
    assert "--tensor_parallel_size" in done(capsys, "to-shards", "--help")
    assert "--tensor_parallel_size" not in done(capsys, "to-hf", "--help")


def test_one_process_only(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, "without torchrun", "to-hf", "--input", tmp_path, "--output", tmp_path / "out")


# ---- memory ----

def grown(rank: int, world_size: int, words: list[str]) -> int:
    """By how many bytes `megalora convert WORDS` raises the peak of a process."""
    return growth(lambda: cli.main(["convert", *words]))



@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Pages of mapped files count. What one model takes at its peak, another with 145 MB more takes too, whichever way:
    buffers of tensors and of threads, which differ between machines."""
    fields = {"vocab_size": 3_000, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    ways = {
        "to-shards": ["--tensor_parallel_size", "2", "--pipeline_parallel_size", "2"],
        "reshard": ["--tensor_parallel_size", "4"],
        "to-hf": ["--max_shard_size", "0.1"],
    }
    sizes, peaks = [], []
    for layers in (3, 8):
        folder = source = make(tmp_path / str(layers), **fields, num_hidden_layers=layers)
        sizes.append((source / "model.safetensors").stat().st_size)
        peaks.append({})
        for command, flags in ways.items():
            output = tmp_path / f"{command}-{layers}"
            words = [command, "--input", str(folder), "--output", str(output), *flags]
            (peaks[-1][command],) = spawn(grown, 1, words)
            folder = output
        assert sums(folder) == sums(source)
    more = sizes[1] - sizes[0]
    assert more > 140 << 20
    for command, (small, large) in {command: [peak[command] for peak in peaks] for command in ways}.items():
        print(f"{command}: {small >> 20} MB of {sizes[0] >> 20}, {large >> 20} of {sizes[1] >> 20}")
        assert large - small < more / 4, command
