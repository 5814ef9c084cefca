"""Rows longer than seq_length: left out, cut or split at turns; every document fits, and no label is made up."""

from __future__ import annotations

import pytest

from megalora.data import ChatTemplate, DataSettings, load_dataset
from megalora.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": role, "content": f"{role} says {number}"}
    for number in range(12)
    for role in ("user", "assistant")
]  # fmt: skip
ROW = {"messages": [SYSTEM, *TURNS]}
SHORT = {"messages": [SYSTEM, *TURNS[:2]]}


@pytest.fixture(scope="module")
def template(chatml):
    return ChatTemplate(chatml)


def load(path, template, seq_length, **settings):
    return load_dataset(path, template, DataSettings(seq_length, packing=False, **settings), 1)


def texts(rows, template):
    """The documents as text, and what is learned of each."""
    found = []
    for index in range(len(rows.source)):
        sample = rows.source.sample(index)
        labels = [label for label in sample.labels.tolist() if label != -100]
        found.append((template.tokenizer.decode(sample.input_ids), template.tokenizer.decode(labels)))
    return found


def replies(first, stop):
    return "".join(f"assistant says {number}<|im_end|>" for number in range(first, stop))


def whole(template, write_json):
    return load(write_json([ROW]), template, 4096).tokens


def test_split(template, write_json):
    length = whole(template, write_json)
    rows = load(write_json([SHORT, ROW]), template, length // 2, on_long_row="split")
    documents = texts(rows, template)
    assert len(documents) >= 4 and rows.skipped == 0
    assert all(text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user") for text, _ in documents)
    assert documents[0][1] == replies(0, 1) and "".join(learned for _, learned in documents[1:]) == replies(0, 12)
    assert rows.source.rows.tolist() == [0] + [1] * (len(documents) - 1)
    assert f"1 rows longer than seq_length were split into {len(documents) - 1} documents" in rows.notes
    assert all(len(rows.source.sample(index).input_ids) <= length // 2 for index in range(len(documents)))


def test_split_takes_as_many_turns_as_fit(template, write_json):
    length = whole(template, write_json)
    first = texts(load(write_json([ROW]), template, length - 1, on_long_row="split"), template)
    assert first[0][1] == replies(0, 11) and first[1][1] == replies(11, 12) and len(first) == 2


def test_an_exchange_that_is_too_long_by_itself(template, write_json):
    long = {"messages": [*TURNS[:2], {"role": "user", "content": "word " * 300}, TURNS[3]]}
    with pytest.raises(UserError, match=r"row 0: too long, .*: message 3 and its reply are \d+ tokens by them"):
        load(write_json([long]), template, 128, on_long_row="split")


def test_split_of_tool_calls_is_at_questions(template, write_json):
    """What answers one question stays together."""
    tool = {"role": "tool", "content": "sunny"}
    answer = [TURNS[0], {"role": "assistant", "content": "I look."}, tool, {"role": "assistant", "content": "Sun."}]
    row = {"messages": [*answer, *answer]}
    length = load(write_json([row]), template, 4096).tokens
    documents = texts(load(write_json([row]), template, length - 1, on_long_row="split"), template)
    assert [learned for _, learned in documents] == ["I look.<|im_end|>Sun.<|im_end|>"] * 2


def test_truncate(template, write_json):
    length = whole(template, write_json)
    rows = load(write_json([ROW]), template, length - 1, on_long_row="truncate")
    ((text, learned),) = texts(rows, template)
    assert learned == replies(0, 11) and text.endswith("assistant says 10<|im_end|>")
    assert "1 rows longer than seq_length were cut behind a reply" in rows.notes


def test_truncate_inside_the_first_reply(template, write_json):
    row = {"instruction": "hello", "output": "word " * 200}
    rows = load(write_json([row]), template, 100, on_long_row="truncate")
    ((_, learned),) = texts(rows, template)
    assert learned.startswith("word word") and "<|im_end|>" not in learned and rows.tokens == 100
    assert "1 rows longer than seq_length were cut inside a reply" in rows.notes
    with pytest.raises(UserError, match="the text before the first reply fills it alone"):
        load(write_json([{"instruction": "word " * 200, "output": "a"}]), template, 100, on_long_row="truncate")


def test_truncate_with_the_last_reply_alone_leaves_nothing(template, write_json):
    with pytest.raises(UserError, match="nothing that is trained is left when it is cut"):
        load(write_json([ROW]), template, 128, on_long_row="truncate", train_on="last")
    rows = load(write_json([ROW]), template, 128, on_long_row="split", train_on="last")
    assert [learned for _, learned in texts(rows, template)] == [replies(11, 12)]


def test_skip_is_no_error(template, write_json):
    rows = load(write_json([SHORT, ROW]), template, 128, on_long_row="skip")
    assert (rows.documents, rows.skipped) == (1, 1)
    assert any("row 1: too long" in note for note in rows.notes)


def test_text_rows(template, write_json, chatml):
    row = {"text": "word " * 200}
    tokens = load(write_json([row]), template, 4096).tokens
    rows = load(write_json([row]), template, 100, on_long_row="split")
    documents = texts(rows, template)
    assert "".join(text for text, _ in documents) == "word " * 200 + "<|endoftext|>" and rows.tokens == tokens
    assert all(text == learned for text, learned in documents)
    cut = load(write_json([row]), template, 100, on_long_row="truncate")
    assert (cut.tokens, cut.notes) == (100, ("1 rows longer than seq_length were cut inside a text",))


def test_the_nested_rows_train_at_the_seq_length_of_the_reference_launch(shared_dir, r1):
    template = ChatTemplate(r1)
    path = shared_dir / "data" / "self_cognition_EmoLLM_nested.json"
    with pytest.raises(UserError, match=r"3401 tokens for --seq_length 2048: .*--on_long_row split"):
        load(path, template, 2048)
    rows = load(path, template, 2048, on_long_row="split")
    flat = load(shared_dir / "data" / "self_cognition_EmoLLM.json", template, 2048)
    assert rows.documents == 2 and rows.labelled_tokens == flat.labelled_tokens
