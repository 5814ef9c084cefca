"""A run that stops and goes on is the run that never stopped; another run never goes on by mistake."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from spawn import SpawnError, spawn
from tiny import column, exported, largest_difference, metrics, tune
from told import user_error

from megalora import cli
from megalora.checkpoint.adapter.shards import read_adapter
from megalora.cluster.lock import LOCK
from megalora.saving import RunSaver
from megalora.training import Trainer

STEPS = 8
FLAGS = {"max_steps": STEPS, "save_steps": 2, "gradient_accumulation_steps": 2, "warmup_steps": 2}
TP2_PP2 = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


def killed(rank: int, world_size: int, command: list[str], before: int) -> None:
    """The run on a rank that ends without a word as it begins step `before` (counted from 1), no save under way."""
    step, save = Trainer.step, RunSaver.save

    def patched(self, number, data, **options):
        if number + 1 == before:
            os._exit(9)
        return step(self, number, data, **options)

    def saved(self, *arguments):
        folder = save(self, *arguments)
        self.settle()
        return folder

    with mock.patch.object(Trainer, "step", patched), mock.patch.object(RunSaver, "save", saved):
        tiny.run(rank, world_size, [command])


def kill(world_size: int, command: list[str], before: int) -> None:
    with pytest.raises(SpawnError, match="exit status 9"):
        spawn(killed, world_size, command, before)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """All steps at once at tp2 pp2, with evaluations."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    tune(4, inputs.flags(folder, **FLAGS, **TP2_PP2, eval_data_path=inputs.data, eval_steps=3))
    return folder


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory) -> Path:
    """The same run, killed in step 6: the newest checkpoint is of step 4, the log has a line on step 5."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    kill(4, inputs.flags(folder, **FLAGS, **TP2_PP2, eval_data_path=inputs.data, eval_steps=3), before=6)
    assert [p.name for p in sorted((folder / "checkpoints").glob("iter_*"))] == ["iter_0000002", "iter_0000004"]
    assert column(folder, "step") == [1, 2, 3, 4, 5]
    return folder


@pytest.fixture
def half(stopped, tmp_path) -> Path:
    """A copy of the stopped run."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Without what depends on the clock."""
    clock = ("tokens_per_second", "tflops")
    return [{k: v for k, v in line.items() if k not in clock} for line in metrics(folder, name)]


def state(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Adapters and moments in the checkpoint of a step."""
    read = read_adapter(folder / "checkpoints" / f"iter_{step:07d}")
    moments = {f"{name} {key}": moment for name, both in read.optimizer.items() for key, moment in both.items()}
    assert len(moments) == 2 * len(read.tensors)
    return read.tensors | moments


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_command_again_goes_on_bit_for_bit(inputs, whole, half):
    command = inputs.flags(half, **FLAGS, **TP2_PP2, eval_data_path=inputs.data, eval_steps=3)
    (done,) = tune(4, command)
    assert f"continuing after step 4 of {half / 'checkpoints/iter_0000004'}" in done.out
    assert "step 5/8" in done.out and "step 4/8" not in done.out
    assert lines(half) == lines(whole)
    assert lines(half, "eval_metrics.jsonl") == lines(whole, "eval_metrics.jsonl")
    assert same_bits(state(half), state(whole)) and same_bits(exported(half), exported(whole))
    ours, theirs = (read_adapter(f / "checkpoints/iter_0000008").trainer for f in (half, whole))
    assert ours == theirs and ours["step"] == 8
    manifests = [json.loads((f / "checkpoints/iter_0000008/manifest.json").read_text()) for f in (half, whole)]
    assert manifests[0]["identity"] == manifests[1]["identity"]

    (again,) = tune(4, command)
    assert "nothing to do: the run is complete at step 8 of 8" in again.out
    assert lines(half) == lines(whole) and same_bits(state(half), state(whole))


@pytest.mark.parametrize(
    "world_size, layout",
    [(1, {}), (2, {"gradient_accumulation_steps": 1}), (2, {"tensor_parallel_size": 2, "sequence_parallel": True})],
    ids=["one process", "dp2", "tp2"],
)
def test_another_layout_goes_on(inputs, whole, half, world_size, layout):
    (done,) = tune(world_size, inputs.flags(half, **FLAGS | layout))
    assert "continuing after step 4" in done.out
    for field in ("loss", "grad_norm"):
        assert column(half, field) == pytest.approx(column(whole, field), abs=1e-5), field
    assert column(half, "learning_rate") == column(whole, "learning_rate")
    assert largest_difference(exported(half), exported(whole)) < 1e-4


def test_another_layout_goes_on_in_float64(inputs, tmp_path):
    """Stopped at tp2 pp2, gone on with on one process: the run that one process makes alone, to the last digits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = FLAGS | {"dtype": "float64", "save_steps": 4}
    tune(1, inputs.flags(whole, **flags))
    kill(4, inputs.flags(parts, **flags, **TP2_PP2), before=6)
    (done,) = tune(1, inputs.flags(parts, **flags))
    assert "continuing after step 4" in done.out
    for field in ("loss", "grad_norm"):
        assert column(parts, field) == pytest.approx(column(whole, field), rel=0, abs=1e-12), field
    ours, theirs = state(parts), state(whole)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float64}
    assert largest_difference(ours, theirs) < 1e-12


def test_without_the_moments_it_would_be_another_run(inputs, whole, half):
    """If it were not, agreeing bit for bit would prove little."""
    with mock.patch("megalora.optimizer.AdapterOptimizer.load_state"):
        tune(1, inputs.flags(half, **FLAGS))
    assert abs(column(half, "loss")[-1] - column(whole, "loss")[-1]) > 1e-3


def test_a_run_killed_before_the_export_makes_it_up(inputs, half):
    """Between the last checkpoint and the PEFT folder, which may be there from a shorter run."""
    tune(1, inputs.flags(half, **FLAGS | {"max_steps": 5}))
    made, other = exported(half), {name: tensor + 1 for name, tensor in exported(half).items()}
    save_file(other, half / "peft/adapter_model.safetensors")
    tune(1, inputs.flags(half, **FLAGS | {"max_steps": 5}))
    assert same_bits(exported(half), made)
    shutil.rmtree(half / "peft")
    tune(1, inputs.flags(half, **FLAGS | {"max_steps": 5}))
    assert same_bits(exported(half), made)


@pytest.mark.parametrize("step, due", [(4, True), (4, False), (STEPS, True)])
def test_a_run_killed_before_an_evaluation_makes_it_up(inputs, whole, tmp_path, step, due):
    """Its checkpoint was there first, of a step between others or of the last one."""
    run = tmp_path / "run"
    flags = {"eval_data_path": inputs.data, "eval_steps": step if due and step < STEPS else 3}
    tune(1, inputs.flags(run, **FLAGS, **flags))
    made = lines(run, "eval_metrics.jsonl")
    for folder in (run / "checkpoints").glob("iter_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    kept = [line for line in made if line["step"] < step]
    (run / "eval_metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    tune(1, inputs.flags(run, **FLAGS, **flags))
    assert lines(run, "eval_metrics.jsonl") == made
    assert [line["step"] for line in made] == {(4, True): [4, 8], (4, False): [3, 6, 8]}.get((step, due), [3, 6, 8])


def test_a_longer_run_goes_on(inputs, half):
    tune(1, inputs.flags(half, **FLAGS | {"max_steps": 6}, save_total_limit=1))
    assert column(half, "step") == [1, 2, 3, 4, 5, 6]
    (done,) = tune(1, inputs.flags(half, **FLAGS | {"max_steps": 7}, save_total_limit=1))
    assert "continuing after step 6" in done.out and column(half, "step") == [1, 2, 3, 4, 5, 6, 7]
    assert [p.name for p in (half / "checkpoints").glob("iter_*")] == ["iter_0000007"]


# ---- another run


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_run_in_the_same_folder_is_refused(inputs, half, tmp_path, world_size):
    other_model = tiny.save_model(tmp_path / "model", intermediate_size=60)
    less = tiny.write_json(tmp_path / "less.json", tiny.questions(40))
    changes = {
        "seed: 42 there, 43 here": {"seed": 43},
        "data: ": {"data_path": less},
        "rows of a step: 2 there, 6 here": {"gradient_accumulation_steps": 6 // world_size},
        "model: ": {"model_path": other_model},
        "lora_config.lora_dropout: 0.1 there, 0.2 here": {"lora_config": {"lora_dropout": 0.2}},
        "(4, 2.0)": {"lora_config": {"r": 3}},
        "(4, 4.0)": {"lora_config": {"lora_alpha": 16}},
        "mlp.down_proj": {"lora_config": {"target_modules": ["v_proj", "o_proj"]}},
        "lora_config.bias: none there, all here": {"lora_config": {"bias": "all"}},
    }
    commands = []
    for number, change in enumerate(changes.values()):
        if "lora_config" in change:
            file = tmp_path / f"lora{number}.json"
            change = {"lora_config": tiny.write_json(file, tiny.LORA | change["lora_config"])}
        commands.append(inputs.flags(half, **FLAGS | {"gradient_accumulation_steps": 2 // world_size} | change))

    def files() -> dict[Path, int]:  # but the lock, which the run that was killed has left, and a run removes
        return {p: p.stat().st_mtime_ns for p in half.rglob("*") if p.is_file() and p.name != LOCK}

    before = files()
    ranks = spawn(tiny.run, 2, commands) if world_size > 1 else [tiny.run(0, 1, commands)]
    for what, done in zip(changes, ranks[0], strict=True):
        assert done.status == 2, (what, done)
        line = user_error(done.err)
        assert what in line and "iter_0000004" in line, (what, line)
    assert all((done.status, done.err) == (2, "") for done in ranks[-1]) or world_size == 1
    assert files() == before, "nothing was touched"


def test_overwrite_output_dir_starts_afresh(inputs, whole, half):
    (half / "notes.txt").write_text("the user's own")
    flags = inputs.flags(half, **FLAGS | {"max_steps": 3, "save_steps": 9}, seed=43, overwrite_output_dir=True)
    (done,) = tune(1, flags)
    assert "continuing" not in done.out
    assert column(half, "step") == [1, 2, 3] and column(half, "loss")[0] != column(whole, "loss")[0]
    assert [p.name for p in (half / "checkpoints").glob("iter_*")] == ["iter_0000003"]
    assert (half / "notes.txt").read_text() == "the user's own"
    assert not (half / "eval_metrics.jsonl").exists(), "there was no evaluation"
    assert len(list((half / "runs").glob("events*"))) == 1


def test_damaged_checkpoints_are_passed_over_and_named(inputs, whole, half):
    shard = next((half / "checkpoints/iter_0000004").rglob("lora_partial_model_optim.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (done,) = tune(1, inputs.flags(half, **FLAGS))
    assert "continuing after step 2" in done.out and "iter_0000004" in done.out and "damaged" in done.out
    assert column(half, "loss") == pytest.approx(column(whole, "loss"), abs=1e-5)

    for file in half.glob("checkpoints/*/manifest.json"):
        file.unlink()
    (done,) = tiny.run(0, 1, [inputs.flags(half, **FLAGS)])
    line = user_error(done.err)
    assert done.status == 2 and "no checkpoint in it is sound" in line and "--overwrite_output_dir true" in line


# ---- an adapter from elsewhere


def test_a_run_goes_on_in_a_new_folder(inputs, whole, half, tmp_path):
    """resume_peft_from_checkpoint of the same run: its step, moments and schedule go on."""
    new = tmp_path / "new"
    (done,) = tune(1, inputs.flags(new, **FLAGS, resume_peft_from_checkpoint=half))
    assert "continuing after step 4" in done.out
    assert column(new, "step") == [5, 6, 7, 8]
    assert column(new, "loss") == pytest.approx(column(whole, "loss")[4:], abs=1e-5)
    assert column(new, "learning_rate") == column(whole, "learning_rate")[4:]
    assert largest_difference(exported(new), exported(whole)) < 1e-4
    (again,) = tune(1, inputs.flags(new, **FLAGS, resume_peft_from_checkpoint=half))
    assert "nothing to do" in again.out, "its own checkpoints go before the adapter it came from"


def test_a_run_on_another_base_is_no_adapter_to_start_from(inputs, half, tmp_path):
    """Of the same shapes, so that nothing else would tell."""
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    for folder in (model, tokenizer):
        shutil.copytree(inputs.model, folder)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, model / "model.safetensors")
    words = json.loads((tokenizer / "tokenizer.json").read_text())
    first, second = list(words["model"]["vocab"])[-2:]
    vocab = words["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    tiny.write_json(tokenizer / "tokenizer.json", words)
    for folder, what in ((model, "model: llama, 2 layers of 32, "), (tokenizer, "tokenizer: 320 tokens, ")):
        commands = [
            ["finetune", *inputs.flags(tmp_path / "new", **FLAGS, model_path=folder, resume_peft_from_checkpoint=half)],
            ["generate", "--model_path", str(folder), "--resume_peft_from_checkpoint", str(half), "--prompt", "Hi"],
            ["finetune", *inputs.flags(half, **FLAGS, model_path=folder)],
        ]
        for command in commands:
            with contextlib.redirect_stderr(io.StringIO()) as err:
                assert cli.main(command) == 2
            line = user_error(err.getvalue())
            assert "iter_0000004" in line and f"{what}" in line and " there, " in line, line
            assert ("tokenizer: " in line, "model: " in line) == (folder == tokenizer, folder == model), line


@pytest.mark.parametrize("form", ["a checkpoint", "shards", "peft", "another run"])
def test_an_adapter_to_start_from(inputs, whole, half, tmp_path, form):
    """The adapter of step 4 in each form. Only what says that it is of this very run goes on with its step."""
    checkpoint = half / "checkpoints/iter_0000004"
    adapter, new, flags = checkpoint, tmp_path / "new", dict(FLAGS)
    if form == "shards":  # without the manifest, under a name of the user's own, and of a run with other rows
        adapter = tmp_path / "lora_checkpoint"
        shutil.copytree(checkpoint, adapter, ignore=shutil.ignore_patterns("manifest.json"))
        flags["gradient_accumulation_steps"] = 4
    elif form == "peft":
        adapter = half / "peft"  # the run was killed before it was made
        tune(1, inputs.flags(half, **FLAGS | {"max_steps": 5}))
        checkpoint = half / "checkpoints/iter_0000005"
    elif form == "another run":
        adapter, flags["seed"] = half, 7
    flags |= {"resume_peft_from_checkpoint": adapter, "learning_rate": 0.0, "lora_config": None}
    (done,) = tune(1, inputs.flags(new, **flags))
    goes_on = form == "a checkpoint"
    assert ("continuing after step 4" in done.out) == goes_on
    assert (f"starting from the adapter {adapter if form != 'another run' else checkpoint}" in done.out) != goes_on
    assert column(new, "step") == [*range(5 if goes_on else 1, STEPS + 1)]
    # At a learning rate of 0 the adapter stays as it came.
    assert same_bits(read_adapter(new / f"checkpoints/iter_{STEPS:07d}").tensors, read_adapter(checkpoint).tensors)


def test_a_part_of_a_run_leaves_no_export_of_an_older_one_and_says_what_has_changed(inputs, tmp_path):
    """Killed after it went on: peft/ would be that of fewer steps."""
    folder = tmp_path / "run"
    flags = FLAGS | {"warmup_steps": 0}
    tune(1, inputs.flags(folder, **flags | {"max_steps": 2}))
    assert (folder / "peft/adapter_model.safetensors").exists()
    kill(1, inputs.flags(folder, **flags), before=4)
    assert not (folder / "peft").exists()
    changed = flags | {"learning_rate": 1e-4, "resume_peft_from_checkpoint": tmp_path / "nowhere"}
    (done,) = tune(1, inputs.flags(folder, **changed))
    assert "goes on with other settings (learning_rate: 0.005 there, 0.0001 here; steps of the run: 2 there" in done.out
    assert "nowhere is not read: the run in output_dir goes on" in done.out
    assert (folder / "peft/adapter_model.safetensors").exists()
    (done,) = tune(1, inputs.flags(folder, **changed | {"max_steps": 4}))
    assert f"nothing to do: the run is complete at step {STEPS} and 4 steps are asked for" in done.out
    named = read_adapter(folder / f"checkpoints/iter_{STEPS:07d}").lora_config["base_model_name_or_path"]
    assert named == str(inputs.model), "what converts or merges it needs not be told"


@pytest.mark.parametrize("part", ["", "checkpoints/iter_0000004"])
def test_a_new_run_does_not_remove_the_adapter_it_starts_from(inputs, half, part):
    flags = {"overwrite_output_dir": True, "resume_peft_from_checkpoint": half / part}
    line, hint = refused(inputs.flags(half, **FLAGS, **flags))
    assert "lies in output_dir" in line and "copy the adapter elsewhere" in hint
    assert read_adapter(half / "checkpoints/iter_0000004").tensors


@pytest.mark.parametrize(
    "mistake", [{"data_path": "nowhere.json"}, {"seq_length": 8}, {"lora_config": "nowhere.json"}], ids=str
)
def test_what_a_mistake_would_have_overwritten_is_still_there(inputs, half, mistake):
    """Also for who is started again after it died there: the old run is not its own."""
    before = lines(half)
    refused(inputs.flags(half, **FLAGS | mistake, overwrite_output_dir=True))
    assert lines(half) == before and read_adapter(half / "checkpoints/iter_0000004").tensors
    assert (half / ".overwrite").exists()
    with mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT="1"):
        command = inputs.flags(half, **FLAGS | {"gradient_accumulation_steps": 4}, overwrite_output_dir=True)
        assert cli.main(["finetune", *command]) == 0
        assert column(half, "step") == [*range(1, STEPS + 1)]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert cli.main(["finetune", *command]) == 0
    assert "nothing to do" in out.getvalue(), "what the run has made, a restart goes on with"
    assert not (half / ".overwrite").exists()


def test_a_run_that_goes_on_forgets_what_was_to_be_overwritten(inputs, half):
    refused(inputs.flags(half, **FLAGS | {"data_path": "nowhere.json"}, overwrite_output_dir=True))
    assert (half / ".overwrite").exists()
    assert cli.main(["finetune", *inputs.flags(half, **FLAGS)]) == 0
    assert not (half / ".overwrite").exists()


def refused(command: list[str]) -> list[str]:
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert cli.main(["finetune", *command]) == 2
    return err.getvalue().splitlines()
