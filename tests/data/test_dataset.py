"""From a file to rows: bad rows are named or skipped, and the fingerprint is the data's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalora.data import ChatTemplate, Conversation, DataSettings, Message, load_dataset, read_rows
from megalora.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "data" / "self_cognition.json"
GOOD = {"instruction": "hello", "output": "I am Mega."}
LONG = {"instruction": "hello " * 200, "output": "I am Mega."}


@pytest.fixture(scope="module")
def template(chatml):
    return ChatTemplate(chatml)


def load(path, template, seq_length=128, seed=1, **settings):
    return load_dataset(path, template, DataSettings(seq_length, **settings), seed)


def test_bundled_rows(template):
    rows = load(EXAMPLE, template, 512)
    assert rows.documents == len(list(read_rows(EXAMPLE))) and (rows.skipped, rows.notes) == (0, ())
    assert 0 < rows.labelled_tokens < rows.tokens <= rows.rows * 512
    one_each = load(EXAMPLE, template, 512, packing=False)
    assert one_each.rows == rows.documents > rows.rows
    assert (one_each.tokens, one_each.labelled_tokens) == (rows.tokens, rows.labelled_tokens)


def test_labels_are_shifted_once(template, chatml, write_json):
    row = load(write_json([GOOD]), template).row(0)
    (document,) = template.encode(Conversation((Message("user", "hello"), Message("assistant", "I am Mega."))))
    n = len(document.input_ids)
    assert row.input_ids[:n].tolist() == document.input_ids.tolist()
    assert row.labels[: n - 1].tolist() == document.labels[1:].tolist() and row.labels[n - 1] == -100
    assert chatml.decode([label for label in row.labels.tolist() if label != -100]) == "I am Mega.<|im_end|>"


def test_padding_is_a_token_that_the_model_has(template, write_json):
    rows = load(write_json([GOOD]), template)
    assert set(rows.row(0).input_ids[rows.tokens :].tolist()) == {template.end_token_id}


@pytest.mark.parametrize(
    "row, told",
    [
        (LONG, r"row 1: too long, \d+ tokens for --seq_length 128; raise --seq_length to at least \d+"),
        ({"words": "a"}, "row 1: the row has no known shape"),
        ({"instruction": "a", "output": ""}, "row 1: .* is empty"),
        ("a", "row 1: a row must be an object"),
    ],
)
def test_bad_rows_are_named_or_skipped(template, write_json, row, told):
    path = write_json([GOOD, row, GOOD])
    with pytest.raises(UserError, match=rf"data.json {told}.*--on_bad_row skip"):
        load(path, template)
    rows = load(path, template, on_bad_row="skip")
    assert rows.documents == 2 and rows.skipped == 1 and "data.json row 1: " in rows.notes[1]


def test_no_row_left(template, write_json):
    with pytest.raises(UserError, match="none of the 2 rows can be used; the first: .*row 0: too long"):
        load(write_json([LONG, LONG]), template, on_bad_row="skip")


def test_a_row_just_as_long_as_seq_length_is_taken(template, write_json):
    path = write_json([GOOD])
    length = load(path, template).tokens
    assert load(path, template, length).row(0).lengths == (length,)
    with pytest.raises(UserError, match="too long"):
        load(path, template, length - 1)


def test_fingerprint_is_of_the_data_and_not_of_the_seed(template, write_json):
    path, other = write_json([GOOD, GOOD]), write_json([GOOD], "other.json")
    prints = [
        load(path, template).fingerprint,
        load(path, template, seq_length=64).fingerprint,
        load(path, template, packing=False).fingerprint,
        load(other, template).fingerprint,
    ]
    assert len(set(prints)) == 4
    assert load(path, template, seed=2).fingerprint == prints[0]


def test_real_files(shared_dir, r1):
    template = ChatTemplate(r1)
    flat, nested, processed = (
        load(shared_dir / "data" / name, template, 4096)
        for name in (
            "self_cognition_EmoLLM.json",
            "self_cognition_EmoLLM_nested.json",
            "processed_self_cognition_EmoLLM.json",
        )
    )
    assert (flat.documents, nested.documents, processed.documents) == (85, 1, 85)
    assert flat.labelled_tokens == nested.labelled_tokens == processed.labelled_tokens
