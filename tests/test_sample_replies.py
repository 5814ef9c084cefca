"""Replies to sample prompts while a run trains: those of `megalora generate` with its adapter, on every layout, and
training that does not notice."""

import json

import pytest
import tiny
from tiny import exported, largest_difference, metrics, tune
from told import user_error

import megalora

STEPS = {"max_steps": 4, "gradient_accumulation_steps": 4, "sample_max_new_tokens": 12}
TP2_PP2 = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("Who are you? 3\n\nWho are you now now? 5\nwho\n")
    return file


@pytest.fixture(scope="module")
def run(inputs, prompts, tmp_path_factory):
    """A run of one process that replies at step 0, at its evaluations and at the end."""
    folder = tmp_path_factory.mktemp("run") / "run"
    tune(1, inputs.flags(folder, **STEPS, sample_prompts=prompts, eval_steps=3, eval_data_path=inputs.data))
    return folder


def test_they_are_the_replies_of_generate_with_the_adapter(inputs, prompts, run):
    lines = metrics(run, "replies.jsonl")
    assert [line["step"] for line in lines] == [0, 3, 4]
    asked = {"model_path": inputs.model, "prompts_file": prompts, "max_new_tokens": 12, "temperature": 0.0}
    replies = megalora.generate(**asked, resume_peft_from_checkpoint=run)
    kept = [{name: one[name] for name in ("prompt", "response", "finish_reason")} for one in replies]
    assert lines[-1]["replies"] == kept
    assert lines[0]["replies"] != lines[-1]["replies"], "it learned to say something else"


def test_training_does_not_notice(inputs, run, tmp_path):
    flags = {name: value for name, value in STEPS.items() if name != "sample_max_new_tokens"}
    tune(1, inputs.flags(tmp_path / "run", **flags, eval_steps=3, eval_data_path=inputs.data))
    for file in ("metrics.jsonl", "eval_metrics.jsonl"):
        ours, theirs = (metrics(folder, file) for folder in (run, tmp_path / "run"))
        assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    assert largest_difference(exported(run), exported(tmp_path / "run")) == 0
    assert not (tmp_path / "run/replies.jsonl").exists()


def test_every_layout_gives_the_same(inputs, prompts, run, tmp_path):
    flags = STEPS | TP2_PP2 | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    tune(4, inputs.flags(tmp_path / "cut", **flags, sample_prompts=prompts, eval_steps=3))
    flags = STEPS | {"gradient_accumulation_steps": 2}
    tune(2, inputs.flags(tmp_path / "copies", **flags, sample_prompts=prompts, eval_steps=3))
    for name in ("cut", "copies"):
        assert metrics(tmp_path / name, "replies.jsonl") == metrics(run, "replies.jsonl"), name


def test_a_resumed_run_writes_each_once(inputs, prompts, tmp_path):
    flags = STEPS | {"sample_prompts": prompts, "eval_steps": 2, "save_steps": 2, "lr_scheduler_type": "constant"}
    tune(1, inputs.flags(tmp_path / "whole", **flags), inputs.flags(tmp_path / "run", **flags | {"max_steps": 2}))
    file = tmp_path / "run/replies.jsonl"
    first, second = file.read_text().splitlines(keepends=True)
    file.write_text(first)  # as if it had been killed between its save and its replies
    tune(1, inputs.flags(tmp_path / "run", **flags))
    assert metrics(tmp_path / "run", "replies.jsonl") == metrics(tmp_path / "whole", "replies.jsonl")
    assert [line["step"] for line in metrics(tmp_path / "run", "replies.jsonl")] == [0, 2, 4]
    assert file.read_text().splitlines(keepends=True)[1] == second


def test_what_cannot_reply_is_refused(inputs, prompts, tmp_path):
    def refused(**flags):
        return user_error(tiny.run(0, 1, [inputs.flags(tmp_path / "out", **STEPS, **flags)])[0].err)

    assert "sample_prompts" in refused(sample_prompts=tmp_path / "none.txt")
    many = tmp_path / "many.txt"
    many.write_text("who\n" * 33)
    assert "holds 33 prompts, and at most 32" in refused(sample_prompts=many)
    rows = tiny.write_json(tmp_path / "labels.json", [{"text": "a b", "label": "x"}, {"text": "c", "label": "y"}] * 9)
    lora = tiny.write_json(tmp_path / "lora.json", tiny.LORA | {"task_type": "SEQ_CLS"})
    said = refused(sample_prompts=prompts, data_path=rows, lora_config=lora)
    assert "sample_prompts has no effect for task_type SEQ_CLS" in said
    assert json.loads(rows.read_text())
