"""The Python API: the commands as functions, of the same flags, checks and numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist

import megalora
from megalora import commands
from megalora.errors import UserError
from megalora.planning.plans import Plan


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tiny.program, "choose_device", lambda: (torch.device("cpu"), None))


@pytest.fixture(scope="module")
def flags(inputs):
    return {
        "model_path": inputs.model,
        "data_path": inputs.data,
        "lora_config": inputs.lora,
        "seq_length": tiny.SEQ_LENGTH,
        "max_steps": 2,
        "learning_rate": 5e-3,
    }


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    """The output_dir of a run from Python."""
    folder = tmp_path_factory.mktemp("runs") / "api"
    megalora.finetune(**flags, output_dir=folder)
    return folder


def test_importing_it_imports_nothing_heavy():
    code = "import sys, megalora; print([name for name in sys.modules if name.startswith('megalora.')])"
    code += "; print({'torch', 'numpy', 'transformers', 'yaml'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tiny.ROOT)
    assert printed.stdout.splitlines() == ["['megalora.errors']", "set()"]


def test_finetune_twice_in_one_process_is_the_command(inputs, flags, run, tmp_path):
    assert not dist.is_initialized()
    megalora.finetune(**flags, output_dir=str(tmp_path / "again"))
    words = {name: flags[name] for name in ("max_steps", "learning_rate")} | {"lr_scheduler_type": None}
    tiny.tune(1, inputs.flags(tmp_path / "command", **words))
    assert not dist.is_initialized()
    assert (
        tiny.column(run, "loss") == tiny.column(tmp_path / "again", "loss") == tiny.column(tmp_path / "command", "loss")
    )


def test_finetune_returns_what_the_program_returns(flags, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tiny.program, "finetune", lambda arguments: seen.append(arguments) or "the result")
    assert megalora.finetune(**flags, output_dir=tmp_path) == "the result"
    assert seen[0].train.output_dir == str(tmp_path) and seen[0].train.max_steps == 2


def test_generate_returns_replies(inputs, run, tmp_path, capfd):
    asked = {"model_path": inputs.model, "resume_peft_from_checkpoint": run, "max_new_tokens": 4}
    (reply,) = megalora.generate(**asked, prompt="Who are you?")
    assert capfd.readouterr().out == "", "it returns the replies"
    assert reply["prompt"] == "Who are you?" and set(reply) == {"prompt", "response", "finish_reason"}
    file, prompts = tmp_path / "replies.jsonl", tmp_path / "prompts.txt"
    prompts.write_text("Who are you?\nWho are you now?\n")
    replies = megalora.generate(**asked, prompts_file=prompts, output_file=file, compare_base=True)
    assert [one["prompt"] for one in replies] == ["Who are you?", "Who are you now?"]
    assert replies[0]["response"] == reply["response"] and "base_response" in replies[0]
    assert replies == [json.loads(line) for line in file.read_text().splitlines()]


def test_generate_names_what_does_not_apply(inputs):
    with pytest.warns(UserWarning, match="not applied in generation: save_steps, seed"):
        (reply,) = megalora.generate(
            model_path=inputs.model, prompt="Hi", max_new_tokens=1, temperature=0, save_steps=3, seed=1
        )
    assert reply["finish_reason"]


def test_generate_has_no_terminal(inputs):
    with pytest.raises(UserError, match="prompt or prompts_file must be given"):
        megalora.generate(model_path=inputs.model)


def test_replies_may_hold_any_character(inputs, monkeypatch):
    row = {"prompt": "Hi", "response": "a\u2028b\x85c\x0bd\r\n", "finish_reason": "stop"}

    def generate(arguments):
        Path(arguments.generation.output_file).write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")

    monkeypatch.setattr(commands, "generate", generate)
    assert megalora.generate(model_path=inputs.model, prompt="Hi") == [row]


def test_other_ranks_get_no_replies(inputs, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(commands, "generate", lambda arguments: None)
    assert megalora.generate(model_path=inputs.model, prompt="Hi") == []


def test_plan_returns_layouts(inputs):
    plans = megalora.plan(model_path=inputs.model, gpus=2, seq_length=64)
    assert plans and all(isinstance(one, Plan) for one in plans)
    assert [one.seconds for one in plans] == sorted(one.seconds for one in plans)
    assert {one.layout.tp * one.layout.pp * one.layout.dp for one in plans} == {2}


def test_convert_returns_the_folder(inputs, run, tmp_path):
    shards = megalora.convert("to-shards", input=inputs.model, output=tmp_path / "shards", tensor_parallel_size=2)
    assert shards == tmp_path / "shards" and len([*shards.glob("mp_rank_*")]) == 2
    merged = megalora.convert("adapter merge", input=run, base=inputs.model, output=tmp_path / "merged")
    assert (merged / "model.safetensors").is_file()
    with pytest.raises(UserError, match="unknown command convert to_hf: give one of to-shards, to-hf"):
        megalora.convert("to_hf", input=shards, output=tmp_path / "back")


@pytest.mark.parametrize(
    ("function", "values", "message", "hint"),
    [
        (megalora.finetune, {"learning_rat": 1}, "unknown argument learning_rat", "did you mean learning_rate?"),
        (megalora.finetune, {}, "model_path, data_path and output_dir must be given", "output_dir is the folder"),
        (megalora.finetune, {"prompt": "Hi"}, "argument prompt belongs to megalora generate", "leave it out"),
        (megalora.generate, {"tmperature": 1}, "unknown argument tmperature", "did you mean temperature?"),
        (megalora.plan, {"gpu": 1}, "unknown argument gpu", "did you mean gpus?"),
        (megalora.generate, {"model_path": "nowhere", "prompt": "Hi"}, "model_path nowhere does not exist", "name a"),
        (lambda **values: megalora.convert("to-hf", **values), {"inputs": 1}, "unknown argument inputs", "mean input?"),
    ],
)
def test_mistakes_raise(function, values, message, hint):
    with pytest.raises(megalora.UserError) as caught:
        function(**values)
    assert caught.value.message == message and hint in caught.value.hint


def test_modules_do_not_hide_the_functions():
    import megalora.convert
    import megalora.finetune
    import megalora.generate
    import megalora.plan

    assert megalora.finetune is not sys.modules["megalora.finetune"]
    for name in ("finetune", "generate", "plan", "convert"):
        assert callable(getattr(megalora, name)) and Path(sys.modules[f"megalora.{name}"].__file__).stem == name
