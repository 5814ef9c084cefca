"""From a file to rows: bad rows are named or skipped, and the fingerprint is the data's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalora.data import (
    ChatTemplate,
    Conversation,
    DataSettings,
    FieldNames,
    Message,
    load_dataset,
    load_split,
    read_rows,
)
from megalora.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "data" / "self_cognition.json"
GOOD = {"instruction": "hello", "output": "I am Mega."}
LONG = {"instruction": "hello " * 200, "output": "I am Mega."}


@pytest.fixture(scope="module")
def template(chatml):
    return ChatTemplate(chatml)


def load(path, template, seq_length=128, seed=1, **given):
    return load_dataset(path, template, DataSettings(seq_length, **given), seed)


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
        (LONG, r"row 1: too long, \d+ tokens for --seq_length 128: raise --seq_length to at least \d+"),
        ({"words": "a"}, "row 1: the row has no known shape"),
        ({"instruction": "a", "output": ""}, "row 1: .* is empty"),
        ("a", "row 1: the row is a JSON string: make it an object"),
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


def test_bad_rows_are_counted_by_kind(template, write_json):
    bad = [{"instruction": "a", "output": ""}, LONG, {"instruction": "b", "output": " "}, {"words": 1}, GOOD]
    path = write_json([*bad, {"input": "x", "output": "b", "label": True}])
    with pytest.raises(UserError) as error:
        load(path, template)
    first, *kinds, lengths = error.value.message.splitlines()
    assert first == "5 of 6 rows cannot be used:" and error.value.hint.endswith("--on_bad_row skip")
    assert str(error.value).splitlines() == [first, *kinds, lengths, error.value.hint]
    assert kinds[0].startswith("2 x ") and "data.json row 0: " in kinds[0] and len(kinds) == 4
    longest = int(lengths.partition(" with ")[2].split()[0])
    assert "data.json row 1 with" in lengths and f"{longest} holds 95%, {longest} holds 99%" in lengths
    rows = load(path, template, on_bad_row="skip")
    assert rows.skipped == 5 and list(rows.notes) == ["5 of 6 rows are left out:", *kinds]


def test_seq_length_that_holds_most_rows(template, write_json):
    rows = [GOOD] * 96 + [{"instruction": "hello " * 60, "output": "I am Mega."}] * 3 + [LONG, LONG]
    with pytest.raises(UserError) as error:
        load(write_json(rows), template, 64)
    lengths = [load(write_json([row]), template, 4096).tokens for row in (GOOD, rows[96], LONG)]
    last = error.value.message.splitlines()[-1]
    assert f"{lengths[0]} holds 95%, {lengths[2]} holds 99%, {lengths[2]} all of them" in last


def test_harmless_fields_are_named_with_their_count(template, write_json):
    rows = load(write_json([GOOD | {"id": 1, "source": "web"}, GOOD | {"id": 2}]), template)
    assert rows.notes == ("fields of the rows that are not learned: id (2), source (1)",)


def test_columns(template, write_json):
    mine = [{"ask": "hello", "reply": "I am Mega.", "junk": 5}]
    names = FieldNames({"ask": "instruction", "reply": "output"}, frozenset({"junk"}))
    assert load(write_json(mine), template, names=names).fingerprint == load(write_json([GOOD]), template).fingerprint


def learned(rows, template):
    return [
        template.tokenizer.decode([label for label in rows.source.sample(index).labels.tolist() if label != -100])
        for index in range(len(rows.source))
    ]


def test_what_is_trained(template, write_json):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "who?", "train": False},
        {"role": "assistant", "content": "two"},
    ]
    path = write_json([{"messages": talk}])
    assert learned(load(path, template), template) == ["one<|im_end|>two<|im_end|>"]
    assert learned(load(path, template, train_on="last"), template) == ["two<|im_end|>"]
    (prompts,) = learned(load(path, template, train_on="prompt"), template)
    assert "Be brief." in prompts and "hello" in prompts and "who?" not in prompts and prompts.endswith("two<|im_end|>")
    talk[2]["weight"] = 0
    assert learned(load(write_json([{"messages": talk}]), template), template) == ["two<|im_end|>"]
    with pytest.raises(UserError, match="no token to learn"):
        load(write_json([GOOD | {"weight": 0}]), template)


def test_weights_through_the_cache(template, write_json, tmp_path):
    """A weight is kept with the tokens of its turn, counted, and part of what the data is; all the same is none."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    def load(weight, other=1):
        rows = [{"messages": [*turns, turns[0], turns[1] | {"weight": weight}]}, {"messages": turns, "weight": other}]
        return load_dataset(write_json(rows), template, DataSettings(64, packing=False, data_cache=tmp_path / "c"), 0)

    plain, weighted = load(1), load(0.25)
    again = load(0.25)
    assert plain.source.weights is None and not [n for n in plain.notes if "weights of" in n]
    assert weighted.notes[0] == "1 rows have weights of their own: the loss is the weighted mean over the labels"
    assert plain.fingerprint != weighted.fingerprint == again.fingerprint
    (long,) = np.flatnonzero(weighted.row_labels == max(weighted.row_labels))
    row = weighted.row(long)
    labels, found = row.labels[row.labels != -100], row.weights[row.labels != -100]
    half = len(labels) // 2
    assert labels[:half].tolist() == labels[half:].tolist() and found.tolist() == [1] * half + [0.25] * half
    assert weighted.row_weights[long] == 1.25 * half and not row.weights[row.labels == -100].any()
    assert again.row(long).weights.tolist() == row.weights.tolist()
    assert load(2, 3).row_weights.tolist() != load(2).row_weights.tolist()
    with pytest.raises(UserError, match="no token to learn"):
        load(1, 0)


def test_text_rows_are_trained_whole(template, write_json):
    assert learned(load(write_json([{"text": "hello world"}]), template), template) == ["hello world<|endoftext|>"]


NUMBERED = [{"instruction": "hello", "output": f"number {number}."} for number in range(40)]


def test_what_is_learned_otherwise_than_it_looks_is_told(template, write_json):
    """Names that were never put in, as in LLaMA-Factory's identity.json."""
    row = {"instruction": "a", "output": "I am {{name}}, made by {{ author }}."}
    assert load(write_json([row, row, {"instruction": "{{x}}", "output": "b"}]), template).notes == (
        "2 rows hold {{name}} or {{author}} and learn just that: put the names in their place first",
    )


def test_a_share_for_evaluation(template, write_json):
    path = write_json(NUMBERED)
    how = DataSettings(128)
    train, held = load_split(path, template, how, 1, 0.25)
    assert (train.documents, held.documents) == (30, 10)
    assert sorted([*train.members.tolist(), *held.members.tolist()]) == list(range(40))
    again, other = load_split(path, template, how, 1, 0.25)[1], load_split(path, template, how, 2, 0.25)[1]
    assert again.members.tolist() == held.members.tolist() != other.members.tolist()
    whole = load(path, template)
    assert len({train.fingerprint, held.fingerprint, whole.fingerprint, other.fingerprint}) == 4
    assert load_split(path, template, how, 1)[0].fingerprint == whole.fingerprint
    with pytest.raises(UserError, match="both sides need a row"):
        load_split(path, template, how, 1, 0.001)


def test_the_documents_of_a_row_are_on_one_side(template, write_json):
    turns = [{"input": "hello", "output": f"number {number}."} for number in range(12)]
    path = write_json([{"conversation": turns} for _ in range(10)])
    train, held = load_split(path, template, DataSettings(64, on_long_row="split"), 1, 0.3)
    rows = [set(part.source.rows[part.members].tolist()) for part in (train, held)]
    assert not rows[0] & rows[1] and len(rows[1]) == 3


def test_several_files_and_weights(template, write_json, tmp_path):
    one, other = write_json(NUMBERED[:10], "one.json"), write_json(NUMBERED[10:14], "other.json")
    counts = [0] * 14
    rows = load(f"{one}:2.5,{other}", template)
    for member in rows.members.tolist():
        counts[member] += 1
    assert sorted(counts[:10]) == [2] * 5 + [3] * 5 and counts[10:] == [1] * 4
    assert load(f"{one},{other}", template).fingerprint == load(write_json(NUMBERED[:14]), template).fingerprint
    assert load(f"{one}:2.5,{other}", template).fingerprint == rows.fingerprint
    assert rows.fingerprint != load(f"{one}:2,{other}", template).fingerprint
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in (one, other):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "README.md").write_text("rows")
    assert load(folder, template).fingerprint == load(f"{one},{other}", template).fingerprint
    with pytest.raises(UserError, match="weight must be above 0"):
        load(f"{one}:0", template)
    with pytest.raises(UserError, match="one.json:0.01 leaves none of its 10 documents: raise the weight"):
        load(f"{one}:0.01,{other}", template)
    with pytest.raises(UserError, match="cannot read the data file .*none.json"):
        load(f"{one},{tmp_path}/none.json", template)


def test_the_first_rows(template, write_json):
    path = write_json(NUMBERED)
    assert load(path, template, max_rows=7).fingerprint == load(write_json(NUMBERED[:7]), template).fingerprint
    assert load(f"{path},{path}", template, max_rows=7).documents == 14


def test_ids_are_those_of_apply_chat_template(chatml, r1, write_json):
    """Rows whose template needs no splitting."""
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "I am Mega."}]
    system = {"role": "system", "content": "你是 Mega。"}
    conversations = [talk, [system, *talk], [system, *talk, *talk], [*talk, *talk, *talk]]
    for tokenizer in (chatml, r1):
        rows = load(write_json([{"messages": one} for one in conversations]), ChatTemplate(tokenizer), 512)
        for index, messages in enumerate(conversations):
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            found = rows.source.sample(index).input_ids.tolist()
            assert found == ids[: len(found)] and len(ids) - len(found) <= 1, "the newline behind the last end token"


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["\ud83d", "x" * 5000]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "conversations", "conversation", "role", "content", "from", "value", "text"])
            | st.sampled_from(["system", "instruction", "input", "output", "history", "tools", "thinking", "weight"])
            | st.text(max_size=3),
            inner | st.sampled_from(["user", "gpt"]),
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(anything, min_size=1, max_size=8))
def test_no_row_is_lost_without_a_count(template, tmp_path, rows):
    """Random unicode, empty, huge and nested values."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, *rows]))
    loaded = load(path, template, on_bad_row="skip")
    used = np.unique(loaded.source.rows)
    assert len(used) + loaded.skipped == len(rows) + 1 and 0 in used
    "\n".join(loaded.notes).encode()
