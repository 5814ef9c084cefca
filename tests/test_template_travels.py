"""The chat template is part of what a run makes: whoever uses its adapter prompts as the run did."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import tiny
from transformers import AutoTokenizer

from megalora import cli
from megalora.data import ChatTemplate, Conversation
from megalora.data.template import TemplateOptions
from megalora.data.tokenizer import tokenizer_identity
from megalora.tokenizer_files import read_template

OTHER = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n# ' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n# ' }}{% endif %}"
)
ASK = Conversation.from_dicts([{"role": "user", "content": "Who are you?"}])


def command(*words: object) -> tiny.Done:
    """A command of this process, which must succeed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = cli.main(list(map(str, words)))
    assert status == 0, err.getvalue()
    return tiny.Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with another template than the tokenizer's own: (inputs, template file, output_dir, what it said)."""
    folder = tmp_path_factory.mktemp("trained")
    inputs, template = tiny.make_inputs(folder / "inputs"), folder / "other.jinja"
    template.write_text("\ufeff" + OTHER, encoding="utf-8")
    (done,) = tiny.tune(1, inputs.flags(folder / "out", max_steps=2, template=template))
    return inputs, template, folder / "out", done


def test_a_run_says_its_template(trained):
    _, template, _, done = trained
    assert f"the template {template}" in done.out


def test_a_run_carries_it(trained):
    inputs, _, out, _ = trained
    for folder in (out / "tokenizer", out / "peft"):
        assert read_template(folder) == OTHER  # without the byte order mark
        copy = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        assert copy.chat_template == OTHER
        assert tokenizer_identity(copy) == tokenizer_identity(ChatTemplate.load(inputs.model).tokenizer)


def generated(trained, *more: object, adapter: object = None) -> tiny.Done:
    inputs, _, out, _ = trained
    named = ["--resume_peft_from_checkpoint", adapter or out]
    return command(
        "generate", "--model_path", inputs.model, "--prompt", "Who are you?", "--max_new_tokens", 4, *named, *more
    )


def test_generation_takes_the_adapters_own(trained, tmp_path):
    _, template, out, _ = trained
    said = "the chat template that the adapter was trained with is used, not the one of the model's folder"
    for adapter in (out, next((out / "checkpoints").glob("iter_*")), out / "peft"):
        own = generated(trained, adapter=adapter)
        assert said in own.err
        assert generated(trained, "--template", template, adapter=adapter).out == own.out
    other = generated(trained, "--template", "chatml")
    assert "the built-in template chatml is used; the adapter was trained with another one" in other.err
    base = generated(trained, "--disable_adapter", "true")
    assert "prompts are written with the tokenizer's chat template" in base.err


def test_a_merged_model_carries_it(trained, tmp_path):
    inputs, _, out, _ = trained
    done = command(
        "convert", "adapter", "merge", "--input", out, "--output", tmp_path / "merged", "--base", inputs.model
    )
    assert "has the chat template that the adapter was trained with" in done.err
    merged = ChatTemplate.load(tmp_path / "merged")
    assert merged.source == OTHER and merged.description == "the tokenizer's chat template"
    assert merged.prompt(ASK) == ChatTemplate(merged.tokenizer, None, recorded=OTHER).prompt(ASK)


@pytest.mark.parametrize("what", ["out", "checkpoint", "shards"])
def test_an_export_carries_it(trained, tmp_path, what):
    inputs, _, out, _ = trained
    source = {"out": out, "checkpoint": next((out / "checkpoints").glob("iter_*"))}.get(what, tmp_path / "shards")
    if what == "shards":
        command("convert", "adapter", "from-peft", "--input", out / "peft", "--output", source, "--base", inputs.model)
    command("convert", "adapter", "to-peft", "--input", source, "--output", tmp_path / "peft", "--base", inputs.model)
    assert read_template(tmp_path / "peft") == OTHER
    assert AutoTokenizer.from_pretrained(tmp_path / "peft", trust_remote_code=False).chat_template == OTHER


def test_a_run_from_an_adapter_of_another_template_says_so(trained, tmp_path):
    inputs, _, out, _ = trained
    (done,) = tiny.tune(
        1, inputs.flags(tmp_path, max_steps=1, resume_peft_from_checkpoint=out / "peft", lora_config=None)
    )
    assert "was trained with another chat template than the tokenizer's chat template" in done.out


def test_values_of_variables_travel(tmp_path):
    inputs = tiny.make_inputs(tmp_path / "inputs")
    file = inputs.model / "tokenizer_config.json"
    template = "{% if brief is defined and brief %}brief {% endif %}" + tiny.CHATML
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    (inputs.model / "chat_template.jinja").write_text(template)
    flags = inputs.flags(tmp_path / "out", max_steps=1, chat_template_kwargs='{"brief": true, "x": [null, "a"]}')
    assert "does not read x" in tiny.run(0, 1, [flags])[0].err
    tiny.tune(1, inputs.flags(tmp_path / "out", max_steps=1, chat_template_kwargs='{"brief": true}'))
    run = ChatTemplate.load(tmp_path / "out" / "tokenizer")
    assert run.tokenizer.decode(run.prompt(ASK)).startswith("brief <|im_start|>user")
    off = ChatTemplate.load(tmp_path / "out" / "tokenizer", None, TemplateOptions({"brief": False}))
    assert off.tokenizer.decode(off.prompt(ASK)).startswith("<|im_start|>user")


def test_plain_is_said(tmp_path):
    inputs = tiny.make_inputs(tmp_path / "inputs")
    for file in inputs.model.glob("chat_template*"):
        file.unlink()
    file = inputs.model / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    fields.pop("chat_template", None)
    file.write_text(json.dumps(fields))
    (done,) = tiny.tune(1, inputs.flags(tmp_path / "out", max_steps=1))
    assert (
        "the tokenizer has no chat template: the built-in template plain is used; --template names another" in done.out
    )
    assert "### Instruction" in read_template(tmp_path / "out" / "peft")


def test_overwriting_removes_it(trained, tmp_path):
    inputs, template, _, _ = trained
    out = tmp_path / "out"
    tiny.tune(1, inputs.flags(out, max_steps=1, template=template))
    (out / "tokenizer" / "mine.txt").write_text("kept")
    tiny.tune(1, inputs.flags(out, max_steps=1, overwrite_output_dir=True))
    assert read_template(out / "tokenizer") == tiny.CHATML and (out / "tokenizer" / "mine.txt").exists()
