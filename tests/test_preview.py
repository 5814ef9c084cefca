"""`megalora data`: the rows as the run sees them."""

from __future__ import annotations

import contextlib
import io
import json
from unittest import mock

import pytest
import tiny

from megalora import cli
from megalora.data import ChatTemplate, DataSettings, load_dataset

ROWS = [
    {"instruction": "Who are you?", "output": "I am Mega.", "id": 7},
    {
        "messages": [
            {"role": "user", "content": "你好 \x1b[31m🙂"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c <|im_end|>"},
            {"role": "assistant", "content": "d"},
        ]
    },
    {"instruction": "a", "output": "<think>b"},
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    made = tiny.make_inputs(folder)
    (folder / "good.json").write_text(json.dumps(ROWS[:2]))
    (folder / "bad.json").write_text(json.dumps(ROWS))
    return folder, made


def data(inputs, *more: object, file="good.json", status=0, out=None):
    folder, made = inputs
    out = out or io.StringIO()
    named = [] if "--data_path" in more else ["--data_path", folder / file]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
        words = ["data", "--model_path", made.model, *named, *more]
        assert cli.main(list(map(str, words))) == status, err.getvalue()
    return out.getvalue(), err.getvalue()


def test_what_is_trained_is_told_apart(inputs):
    shown, _ = data(inputs)
    assert "chat template: the tokenizer's chat template" in shown
    assert "train | I am Mega.<|im_end|>\n" in shown and "    - | Who are you?<|im_end|>\n" in shown
    assert "train | b<|im_end|>\n" in shown and "train | d<|im_end|>\n" in shown
    assert "    - | 你好 \\x1b[31m🙂<|im_end|>\n" in shown and "\x1b" not in shown


def test_counts_are_those_of_the_run(inputs):
    folder, made = inputs
    rows = load_dataset(folder / "good.json", ChatTemplate.load(made.model), DataSettings(1024), 0)
    shown, _ = data(inputs, "--rows", 0)
    assert "2 rows, 0 of them left out; 2 documents" in shown
    assert f"{rows.tokens:,} tokens, {rows.labelled_tokens:,} of them trained" in shown
    assert "fields of the rows that are not learned: id (1)" in shown
    assert "special tokens in the text of messages are tokenised as text (1 time)" in shown
    assert "train |" not in shown and sum(line.endswith("#") for line in shown.splitlines()) == 2


def test_weights_of_files_are_told(inputs):
    folder, _ = inputs
    shown, _ = data(inputs, "--data_path", f"{folder / 'good.json'}:0.5")
    assert "2 documents" in shown
    assert f"a run uses them as often as weights say: {folder / 'good.json'} x 0.5\n" in shown
    assert "counted once" not in data(inputs)[0]


def test_one_row(inputs):
    shown, _ = data(inputs, "--row", 1)
    assert "row 1:" in shown and "row 0" not in shown and "left out" not in shown
    _, told = data(inputs, "--row", 2, status=2)
    assert "row 2: there are 2 rows, numbered from 0" in told
    _, told = data(inputs, "--row", 2, file="bad.json", status=2)
    assert "row 2: a reply opens <think> and does not close it" in told
    _, told = data(inputs, "--row", 1, "--rows", 2, status=2)
    assert "row and rows are both given" in told


def test_rows_that_max_rows_leaves_out_have_no_number(inputs):
    folder, _ = inputs
    both = [folder / "good.json", folder / "second.json"]
    both[1].write_text(json.dumps([{"instruction": "Second", "output": "file"}] * 2))
    flags = ["--data_path", ",".join(map(str, both)), "--max_rows", 1]
    shown, _ = data(inputs, *flags, "--row", 1)
    assert "- | Second" in shown
    _, told = data(inputs, *flags, "--row", 2, status=2)
    assert "there are 2 rows, numbered from 0" in told


def test_bad_rows_are_told_as_the_run_would(inputs):
    shown, told = data(inputs, file="bad.json", status=2)
    assert "3 rows, 1 of them left out; 2 documents" in shown
    assert "opens <think> and does not close it" in told and "--on_bad_row skip" in told


def test_documents_that_a_row_becomes(inputs, tmp_path):
    """With the flags of the run."""
    template = tmp_path / "drops.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"messages": [*ROWS[1]["messages"][:1], {"role": "assistant", "content": "<think>so</think>b"}] * 2}
    (inputs[0] / "thinks.json").write_text(json.dumps([row]))
    shown, _ = data(inputs, "--template", template, file="thinks.json")
    assert f"chat template: the template {template}" in shown
    assert "row 0, document 1 of 2:" in shown and shown.count("train | <think>so</think>b<|im_end|>") == 2
    shown, _ = data(inputs, "--template", template, "--history_thinking", "mask", file="thinks.json")
    assert "row 0:" in shown and shown.count("train |") == 1


def test_weights_are_shown(inputs):
    folder, _ = inputs
    first, second = ROWS[1]["messages"][:2]
    (folder / "weights.json").write_text(
        json.dumps([{"messages": [first, second | {"weight": 0.5}, *ROWS[1]["messages"][2:]]}])
    )
    shown, _ = data(inputs, file="weights.json")
    assert "x 0.5 | b<|im_end|>\n" in shown and "train | d<|im_end|>\n" in shown
    assert "1 rows have weights of their own" in shown
    with mock.patch.dict("os.environ", TERM="xterm-256color"):
        assert "[x 0.5]" in data(inputs, file="weights.json", out=Terminal())[0]


def test_colours_on_a_terminal(inputs):
    with mock.patch.dict("os.environ", TERM="xterm-256color"):
        shown, _ = data(inputs, "--row", 1, out=Terminal())
    assert "\x1b[30;42m" in shown and "train |" not in shown
    assert "\\x1b" in shown and "\x1b[31m" not in shown  # the row's own is shown, not obeyed


def test_flags_of_the_run_itself_are_refused(inputs):
    _, told = data(inputs, "--eval_fraction", 0.1, status=2)
    assert "eval_fraction" in told and "megalora finetune" in told
