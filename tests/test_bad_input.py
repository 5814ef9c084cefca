"""What a user can get wrong: one line on rank 0 (what, where, remedy), status 2 on every rank, never a hang."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from snapshots import assert_snapshot
from spawn import SpawnError, spawn
from told import user_error
from waiting import until

from megalora import building, cli, saving, starting
from megalora.errors import RankLost, UserError
from megalora.training import Trainer

TP2, PP2 = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
HANG = 200  # seconds, of a call of spawn


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


class Mess:
    """Makes broken copies of the inputs under a folder."""

    def __init__(self, inputs: tiny.Inputs, folder: Path):
        self.inputs, self.folder, self._count = inputs, folder, 0

    def path(self, name: str) -> Path:
        self._count += 1
        return self.folder / f"{self._count}-{name}"

    def model(self, change: Callable[[Path], None]) -> dict:
        copy = self.path("model")
        shutil.copytree(self.inputs.model, copy)
        change(copy)
        return {"model_path": copy}

    def config(self, **fields: object) -> dict:
        def change(folder: Path) -> None:
            config = json.loads((folder / "config.json").read_text()) | fields
            tiny.write_json(folder / "config.json", config)

        return self.model(change)

    def weights(self, change: Callable[[bytearray], bytearray]) -> dict:
        def damage(folder: Path) -> None:
            file = folder / "model.safetensors"
            file.write_bytes(change(bytearray(file.read_bytes())))

        return self.model(damage)

    def lora(self, text: str | dict) -> dict:
        file = self.path("lora_config.json")
        file.write_text(text if isinstance(text, str) else json.dumps(tiny.LORA | text))
        return {"lora_config": file}

    def data(self, text: str | list) -> dict:
        file = self.path("rows.json")
        file.write_text(text if isinstance(text, str) else json.dumps(text))
        return {"data_path": file}


def sharded(missing: str) -> Callable[[Path], None]:
    """The weights in two files with an index; "file", "index" or "key" is then left out."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map = {}
        for number, name in enumerate(sorted(tensors)):
            weight_map[name] = f"model-0000{1 + number % 2}-of-00002.safetensors"
        for file in sorted(set(weight_map.values())):
            part = {name: t for name, t in tensors.items() if weight_map[name] == file}
            if missing == "key":
                part.pop("model.norm.weight", None)
            save_file(part, folder / file)
        tiny.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        if missing != "key":
            (folder / {"file": file, "index": "model.safetensors.index.json"}[missing]).unlink()

    return change


def tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return rewrite


def flipped(data: bytearray) -> bytearray:
    data[20] ^= 0xFF  # within the JSON of the header
    return data


def longer_header(data: bytearray) -> bytearray:
    return bytearray((1 << 40).to_bytes(8, "little")) + data[8:]


def smaller_vocabulary(folder: Path) -> None:
    """The model, not the tokenizer: some of its tokens have no embedding."""
    tiny.write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | {"vocab_size": 300})

    def cut(state: dict) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][:300].contiguous()

    tensors(cut)(folder)


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


ROW = {"instruction": "Who?", "output": "I."}
CASES: dict[str, tuple[Callable[[Mess], dict], tuple[str, ...]]] = {
    # name: (flags, what the line must say)
    "world size": (lambda m: {"tensor_parallel_size": 3}, ("World size", "tensor_parallel_size (3)", "start 3")),
    "heads": (
        lambda m: m.config(num_attention_heads=3, num_key_value_heads=3, hidden_size=48) | TP2,
        ("tensor_parallel_size (2) does not divide num_attention_heads (3)", "choose"),
    ),
    "uneven heads": (lambda m: TP2 | {"uneven_heads": True}, ("uneven_heads has no effect", "leave it out")),
    "recompute layers": (
        lambda m: {"recompute": "full", "recompute_layers": 9},
        ("recompute_layers (9) is more than num_hidden_layers (2)", "give at most 2"),
    ),
    "stages": (
        lambda m: m.config(num_hidden_layers=1) | PP2,
        ("pipeline_parallel_size (2) is more than num_hidden_layers (1)", "choose at most 1"),
    ),
    "custom stages": (
        lambda m: PP2 | {"partition_method": "custom", "custom_partition": [1, 2]},
        ("custom_partition", "2"),
    ),
    "no model": (
        lambda m: {"model_path": m.path("none")},
        ("model_path", "-none", "does not exist", "name a Hugging Face folder"),
    ),
    "no weights": (
        lambda m: m.model(lambda folder: (folder / "model.safetensors").unlink()),
        ("-model", "holds neither model.safetensors", "name a Hugging Face folder"),
    ),
    "no shard": (
        lambda m: m.model(sharded("file")),
        ("-of-00002.safetensors", "does not exist", "index.json names it", "download"),
    ),
    "no index": (lambda m: m.model(sharded("index")), ("lacks model.safetensors.index.json", "download it")),
    "no key": (lambda m: m.model(sharded("key")), ("model.norm.weight", "-model", "download")),
    "truncated": (
        lambda m: m.weights(lambda data: data[:-1000]),
        ("model.safetensors", "is damaged or not safetensors", "download it again"),
    ),
    "cut short": (lambda m: m.weights(lambda data: data[:5]), ("model.safetensors", "is damaged", "download")),
    "empty": (lambda m: m.weights(lambda data: bytearray()), ("model.safetensors", "is damaged", "download")),
    "flipped": (lambda m: m.weights(flipped), ("model.safetensors", "is damaged", "download it again")),
    "header": (lambda m: m.weights(longer_header), ("model.safetensors", "is damaged", "download it again")),
    "tensor missing": (
        lambda m: m.model(tensors(lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))),
        ("lacks model.layers.1.mlp.up_proj.weight", "-model", "take both from one model"),
    ),
    "tensor left over": (
        lambda m: m.model(tensors(lambda state: state.update(extra=torch.ones(3)))),
        ("holds the unexpected extra", "-model"),
    ),
    "tensor shape": (
        lambda m: m.config(intermediate_size=60),
        ("has shape [32, 56], but config.json means [32, 60]", "model.safetensors"),
    ),
    "tensor dtype": (
        lambda m: m.model(tensors(lambda state: state.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))),
        ("model.norm.weight has dtype I8", "model.safetensors", "use a model in"),
    ),
    "model type": (
        lambda m: m.config(model_type="nonesuch"),
        ("config.json: model_type = 'nonesuch' is not implemented", "lists, such as llama"),
    ),
    "config is no JSON": (
        lambda m: m.model(lambda folder: (folder / "config.json").write_text('{"model_type": ')),
        ("config.json: is not JSON", "download it again"),
    ),
    "config is no text": (
        lambda m: m.model(lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}")),
        ("config.json", "is not JSON", "download it again"),
    ),
    "config is a list": (
        lambda m: m.model(lambda folder: (folder / "config.json").write_text("[]")),
        ("config.json: holds a list", "download"),
    ),
    "config field": (lambda m: m.config(hidden_act="gelu"), ("config.json: hidden_act = 'gelu'", "'silu'")),
    "config number": (
        lambda m: m.config(num_hidden_layers="two"),
        ("config.json: num_hidden_layers = 'two'", "give a whole number from 1 to 4096"),
    ),
    "not finite": (
        lambda m: m.model(tensors(lambda state: state["model.norm.weight"].fill_(torch.nan))),
        ("model.norm.weight: 32 values are not finite", "step 3: loss nan", "3rd step in a row"),
    ),
    "tokenizer is no JSON": (
        lambda m: m.model(lambda folder: (folder / "tokenizer.json").write_text("{")),
        ("cannot read the tokenizer in", "-model", "copy its files again"),
    ),
    "chat template": (
        lambda m: m.model(lambda folder: (folder / "chat_template.jinja").write_text("{% for x in %}")),
        ("the tokenizer's chat template is not valid jinja", "--template"),
    ),
    "tokenizer": (lambda m: m.model(without_tokenizer), ("has no tokenizer", "copy it from the model's folder")),
    "base weights": (
        lambda m: {"resume_from_checkpoint": m.path("none")},
        ("-none", "name a Hugging Face folder"),
    ),
    "unknown flag": (lambda m: {"learning_rat": 1}, ("--learning_rat", "did you mean --learning_rate?")),
    "flag without effect": (lambda m: {"eval_steps": 5}, ("--eval_steps 5 has no effect", "give eval_data_path")),
    "flag value": (lambda m: {"max_steps": "ten"}, ("--max_steps 'ten'", "give a whole number")),
    "flag of generation": (lambda m: {"prompt": "Hi"}, ("--prompt belongs to megalora generate", "leave it out")),
    "no flag": (lambda m: {"data_path": None}, ("--data_path must be given",)),
    "target modules": (
        lambda m: m.lora({"target_modules": ["c_attn"]}),
        ("target_modules", "'c_attn'", "q_proj"),
    ),
    "target pattern": (lambda m: m.lora({"target_modules": "layers[.]9.*"}), ("target_modules", "layers[.]9.*")),
    "target layers": (lambda m: m.lora({"layers_to_transform": [7]}), ("layers_to_transform", "7")),
    "lora_config is no JSON": (
        lambda m: m.lora('{"r": 8,}'),
        ("-lora_config.json: is not JSON", "correct this one"),
    ),
    "lora_config with a field twice": (
        lambda m: m.lora('{"r": 8, "r": 16}'),
        ("-lora_config.json: an object has the field 'r' twice", "keep one"),
    ),
    "lora_config is missing": (lambda m: {"lora_config": m.path("none")}, ("lora_config", "-none", "name an existing")),
    "lora_config field": (lambda m: m.lora({"rank": 8}), ("-lora_config.json: unknown field 'rank'", "remove the")),
    "lora_config value": (lambda m: m.lora({"r": 0}), ("-lora_config.json: r = 0", "give a positive integer")),
    "lora_config for use": (lambda m: m.lora({"inference_mode": True}), ("inference_mode = true", "set it to false")),
    "no data": (lambda m: {"data_path": m.path("none")}, ("-none", "check the path")),
    "empty data": (lambda m: m.data(""), ("-rows.json holds no rows", "instruction")),
    "empty list": (lambda m: m.data([]), ("-rows.json holds no rows", "instruction")),
    "data is no JSON": (lambda m: m.data('[{"instruction": "a"'), ("-rows.json line 1 column", "bad JSON", "fix")),
    "row of no shape": (lambda m: m.data([ROW, {"words": "a"}]), ("-rows.json row 1", "no known shape", "on_bad_row")),
    "row without reply": (lambda m: m.data([ROW, ROW | {"output": " "}]), ("-rows.json row 1", "empty", "on_bad_row")),
    "row too long": (
        lambda m: m.data([ROW, ROW, ROW | {"output": "word " * 90}]),
        ("-rows.json row 2: too long", "--seq_length 64", "raise --seq_length to at least"),
    ),
    "all rows bad": (
        lambda m: m.data([{"words": "a"}]) | {"on_bad_row": "skip"},
        ("none of the 1 rows can be used", "-rows.json row 0", "no known shape"),
    ),
    "bad evaluation row": (
        lambda m: {"eval_data_path": m.data([{"words": "a"}])["data_path"]},
        ("-rows.json row 0", "no known shape", "on_bad_row"),
    ),
    "sequence parallel": (
        lambda m: TP2 | {"sequence_parallel": True, "seq_length": 63},
        ("seq_length (63)", "multiple of tensor_parallel_size (2)", "change seq_length"),
    ),
    "template": (lambda m: {"template": "nonesuch"}, ("--template", "nonesuch", "chatml")),
    "warmup": (lambda m: {"warmup_steps": 10}, ("warmup_steps (10)", "steps of the run (10)", "give fewer")),
    "apex": (lambda m: {"optimizer": "apex"}, ("optimizer = apex", "cannot be imported", "--optimizer adamw")),
    "no adapter": (
        lambda m: {"resume_peft_from_checkpoint": m.path("none")},
        ("adapter", "-none", "is not a folder"),
    ),
    "not an adapter": (
        lambda m: {"resume_peft_from_checkpoint": m.inputs.model},
        ("adapter", "holds neither adapter_config.json", "name one of these"),
    ),
    "output_dir": (lambda m: {"output_dir": m.data("")["data_path"]}, ("output_dir", "-rows.json")),
}
RUNS = {"not finite"}  # found in the steps
NEEDS_TWO = {"heads", "uneven heads", "stages", "custom stages", "sequence parallel"}  # processes


@pytest.fixture(scope="module")
def outcomes(inputs, tmp_path_factory):
    """name -> its results on one process and on each of two, all run once."""
    folder = tmp_path_factory.mktemp("mess")
    mess = Mess(inputs, folder)
    flags = {name: make(mess) for name, (make, _) in CASES.items()}
    commands = {name: inputs.flags(folder / f"run-{n}", **f) for n, (name, f) in enumerate(flags.items())}
    alone = [name for name in CASES if name not in NEEDS_TWO]
    found = {name: [done] for name, done in zip(alone, tiny.run(0, 1, [commands[n] for n in alone]), strict=True)}
    for results in spawn(tiny.run, 2, [*commands.values()]):
        for name, done in zip(CASES, results, strict=True):
            found.setdefault(name, []).append(done)
    started = {folder / f"run-{n}" for n, name in enumerate(CASES) if name in RUNS}
    assert {p for p in folder.glob("run-*") if p.is_dir()} == started, "what is wrong at the start leaves no trace"
    return found


@pytest.mark.parametrize("name", CASES)
def test_one_line_that_says_what_where_and_what_to_do(outcomes, name):
    results = outcomes[name]
    assert [done.status for done in results] == [cli.USER_ERROR] * len(results), results
    assert name in RUNS or all(done.out == "" for done in results), "no table, no step"
    assert results[-1].err == "", "rank 1 is silent"
    for done in results[:-1]:
        said = [line for line in done.err.splitlines() if name in RUNS and line.startswith("megalora: ")]
        line = "\n".join([*said, user_error("\n".join(done.err.splitlines()[len(said) :]))])
        assert len(line) < 600, line
        for part in CASES[name][1]:
            assert part in line, line
        assert "on rank" not in line, "all ranks see it"


def test_the_words(outcomes, inputs, tmp_path_factory):
    """Each error as it is printed, without the paths of this machine and what libraries say in brackets."""
    libraries = r"\((Error|invalid|unexpected|Expected|Expecting)[^()]*(\([^()]*\))?[^()]*\)"
    lists = r"(?<=megalora knows ).*|(?<=write one of ).*\{text\}|(?<=WEIGHT )\(.*\)"
    told = []
    for name in CASES:
        text = re.sub(lists, "...", re.sub(libraries, "(...)", outcomes[name][0].err))
        told.append(f"# {name}\n" + re.sub(r"[^ ,']*/(\d+-)?", "", text))
    assert_snapshot("bad_input", "\n".join(told))


def test_tokens_that_the_model_has_no_embedding_for(inputs, tmp_path):
    flags = Mess(inputs, tmp_path).model(smaller_vocabulary)
    results = [*tiny.run(0, 1, [inputs.flags(tmp_path / "a", **flags)])]
    results += spawn(tiny.run, 2, [inputs.flags(tmp_path / "b", **flags, **TP2)])[0]
    for done in results:
        assert done.status == 2 and "vocab_size (300)" in user_error(done.err), done


def test_json_of_other_types_than_expected(inputs, tmp_path):
    mess = Mess(inputs, tmp_path)
    nested = "[" * 100_000
    cases = [
        mess.model(lambda folder: (folder / "config.json").write_text(nested)),
        mess.config(rope_parameters={"rope_type": "default", "rope_theta": "large"}),
        mess.config(model_type=["llama"]),
        mess.config(architectures=[1]),
        mess.lora(nested),
    ]
    for done in tiny.run(0, 1, [inputs.flags(tmp_path / "run", **flags) for flags in cases]):
        assert done.status == 2 and user_error(done.err), done


# ---- errors that one rank alone sees


def on_one_rank(rank: int, world_size: int, command: list[str], bad_rank: int, what: str, kind: type):
    """A run in which a function of the program raises on one rank only."""
    owners = {"step": Trainer, "load_base_weights": tiny.program, "AdapterOptimizer": building}
    owner = owners.get(what, starting)
    raising = mock.patch.object(owner, what, side_effect=kind(f"{what} failed here"))
    with raising if rank == bad_rank else contextlib.nullcontext():
        return tiny.run(rank, world_size, [command])


SETUP = [
    "read_config", "newest_sound", "resolve_lora", "load_split", "base_identity",
    "load_base_weights", "AdapterOptimizer",
]  # fmt: skip
FIRST_ONLY = ("newest_sound", "base_identity")  # rank 0 does them for all


@pytest.mark.parametrize("what", SETUP)
def test_an_error_of_one_rank_stops_both(inputs, tmp_path, what):
    bad_rank = 0 if what in FIRST_ONLY else 1
    command = inputs.flags(tmp_path / "run", pipeline_parallel_size=2)
    start = time.monotonic()
    (first,), (second,) = spawn(on_one_rank, 2, command, bad_rank, what, UserError, timeout=HANG)
    assert (first.status, second.status, second.err) == (2, 2, ""), (first, second)
    where = " (on rank 1)" if bad_rank else ""
    assert first.err == f"error: {what} failed here{where}\n"
    assert time.monotonic() - start < HANG
    assert not (tmp_path / "run").exists()


def noted(rank: int, world_size: int, command: list[str], bad_rank: int, what: str, folder: Path) -> None:
    """As `on_one_rank`, but what becomes of a rank lies in `folder` before the other one ends its process."""
    (done,) = on_one_rank(rank, world_size, command, bad_rank, what, RuntimeError)
    (folder / f"{rank}.txt").write_text(f"status {done.status}\n{done.err}")


@pytest.mark.parametrize("what, bad_rank", [("load_base_weights", 0), ("load_split", 1), ("step", 1)])
def test_a_bug_on_one_rank_leaves_no_rank_waiting(inputs, tmp_path, what, bad_rank):
    """Whatever is raised there: it shows its traceback, and the other rank, waiting for it, is ended by its watch."""
    command = inputs.flags(tmp_path / "run", tensor_parallel_size=2)
    with pytest.raises(SpawnError, match=rf"rank {1 - bad_rank} of 2:\n.* exit status {RankLost.status}"):
        spawn(noted, 2, command, bad_rank, what, tmp_path, timeout=HANG, grace=HANG)
    told = (tmp_path / f"{bad_rank}.txt").read_text()
    assert told.startswith(f"status {cli.BUG}\n") and f"[rank {bad_rank}] RuntimeError: {what} failed here" in told


def no_room(rank: int, world_size: int, command: list[str]) -> list[tiny.Done]:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with mock.patch.object(saving, "save_adapter", full if rank == 1 else saving.save_adapter):
        return tiny.run(rank, world_size, [command])


def test_a_full_disk_of_one_rank(inputs, tmp_path):
    (first,), (second,) = spawn(
        no_room, 2, inputs.flags(tmp_path / "run", tensor_parallel_size=2, save_steps=2), timeout=HANG
    )
    assert (first.status, second.status, second.err) == (2, 2, ""), (first, second)
    line = user_error(first.err)
    assert "iter_0000002: cannot be written (No space left on device): free space" in line
    assert [*(tmp_path / "run/checkpoints").iterdir()] == [], "no half a checkpoint"


def test_an_output_dir_that_cannot_be_made(inputs, tmp_path):
    """Only rank 0 tries."""
    (tmp_path / "file").write_text("")
    commands = [inputs.flags(tmp_path / "file/run"), inputs.flags(tmp_path / "file/run", save=False)]
    first, second = spawn(tiny.run, 2, commands, timeout=HANG)
    assert [done.status for done in first + second] == [2] * 4
    for done in first:
        assert all(part in user_error(done.err) for part in ("output_dir", "file/run"))


# ---- two runs in one folder


STOPS = """
import os, signal, sys
from megalora import cli
from megalora.training import Trainer

step = Trainer.step

def stopped(self, number, *arguments, **options):
    if number == 25:  # the save of step 20 has begun, and so that of step 10 is complete
        os.kill(os.getpid(), signal.SIGSTOP)
    return step(self, number, *arguments, **options)

Trainer.step = stopped
sys.exit(cli.main(["finetune", *sys.argv[1:]]))
"""


def test_a_second_run_is_kept_out_until_the_first_is_gone(inputs, tmp_path):
    """Whatever it would do there; and however the first one ends, the same command then goes on."""
    run, flags = tmp_path / "run", {"max_steps": 60}
    command = inputs.flags(run, **flags, save_steps=10)
    others = [inputs.flags(run, **flags, **more) for more in ({"save": False}, {"overwrite_output_dir": True})]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tiny.ROOT)}
    start = [sys.executable, "-c", STOPS, *command]
    with subprocess.Popen(start, stdout=subprocess.DEVNULL, env=environment) as first:
        try:
            until("it stands", lambda: os.waitpid(first.pid, os.WUNTRACED | os.WNOHANG)[0])
            assert first.poll() is None and (run / "checkpoints/latest_checkpointed_iteration.txt").exists()
            files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
            told = [*tiny.run(0, 1, others)]
            (both,), (silent,) = spawn(tiny.run, 2, [command], timeout=HANG)
            assert (silent.status, silent.err) == (2, "")
            for done in (*told, both):
                line = user_error(done.err)
                assert done.status == 2 and done.out == ""
                assert line.startswith(f"output_dir {run}: another run is under way in it (process ")
                assert f"(process {first.pid} on " in line and "wait for it or end it, or name another" in line
            assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files
        finally:
            first.kill()
    (done,) = tiny.tune(1, command)
    assert "continuing after step " in done.out and "cannot be locked" not in done.out
    assert tiny.column(run, "step") == [*range(1, 61)] and not (run / ".lock").exists()


def test_a_file_system_without_locks_costs_a_note(inputs, tmp_path):
    with mock.patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "No locks available")):
        (done,) = tiny.tune(1, inputs.flags(tmp_path / "run", max_steps=1))
    assert "cannot be locked (No locks available): a second run in it would not be told from this one" in done.out


# ---- under torchrun


@pytest.mark.parametrize("name", ["world size", "truncated"])
def test_torchrun(inputs, tmp_path, name):
    """The line is printed, once, and the launcher fails: before and after the ranks know of each other."""
    flags = CASES[name][0](Mess(inputs, tmp_path))
    done = tiny.torchrun(tmp_path, 2, *inputs.flags(tmp_path / "run", **flags))
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert done.returncode != 0 and sum(line.startswith("error: ") for line in lines) == 1, done.stderr
    assert all(part in user_error("\n".join(lines)) for part in CASES[name][1])
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
