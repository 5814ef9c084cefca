"""Files and rows: every layout of a file gives the same rows, every shape of a row the same messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalora.data import read_rows, to_messages
from megalora.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "data" / "self_cognition.json"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


texts = st.text(max_size=12)
row_objects = st.dictionaries(texts, st.recursive(texts | st.integers() | st.none(), st.lists), max_size=4)
space = st.text(alphabet=" \t\r\n", max_size=3)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(row_objects, min_size=1, max_size=6), st.data())
def test_every_layout_of_a_file_gives_the_rows(tmp_path, rows, data):
    indent, ascii_only = data.draw(st.sampled_from([None, 2])), data.draw(st.booleans())
    shown = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    concatenated = "".join(data.draw(space) + text for text in shown) + data.draw(space)
    for text in (json.dumps(rows), "\n".join(json.dumps(row) for row in rows), concatenated):
        path = tmp_path / "rows.json"
        path.write_bytes(data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode())
        assert read_rows(path) == rows


def test_rows_as_the_reference_readme_prints_them(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n "conversation": [\n {"input": "hi", "output": "ho"}\n ]\n}\n{"conversation": []}\n')
    assert len(read_rows(path)) == 2


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "holds no rows"),
        (b" \n", "holds no rows"),
        (b"[]", "holds no rows"),
        (b'{"a": 1}\n{"a" 2}', "line 2 column 6"),
        (b'[{"a": 1},\n {"a": 1]', "line 2 column 9"),
        (b'{"a": 1},\n{"a": 2}', "line 1 column 9"),
        (b'{"a": "x\n', "line 1 column 9: bad JSON"),
        (b'{"a": 1}\n{"a": "\xff"}', "line 2: byte 16 is not UTF-8"),
        (b"[" * 100_000, "cannot be read"),
        (b"1" * 5000, "cannot be read"),
    ],
)
def test_bad_files_are_told_with_the_place(tmp_path, content, told):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert told in str(error.value) and "bad.json" in str(error.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot read the data file"):
            read_rows(path)


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"instruction": "a", "input": "", "output": "b"}, [user("a"), assistant("b")]),
        ({"instruction": "a", "input": "x", "output": "b"}, [user("a\nx"), assistant("b")]),
        ({"input": "x", "output": "b", "system": "s"}, [system("s"), user("x"), assistant("b")]),
        ({"instruction": "a", "input": None, "output": " b "}, [user("a"), assistant(" b ")]),
        (
            {"conversation": [{"system": "s", "input": "a", "output": "b"}]},
            [system("s"), user("a"), assistant("b")],
        ),
        (
            {"conversation": [{"system": "s", "input": "a", "output": "b"}] * 2},
            [system("s"), user("a"), assistant("b"), user("a"), assistant("b")],
        ),
        (
            {"conversation": [{"instruction": "i", "input": "a", "output": "b"}]},
            [user("i\na"), assistant("b")],
        ),
        ({"id": 7, "messages": [user("a"), assistant("b")]}, [user("a"), assistant("b")]),
        (
            {
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
                "system": "s",
            },
            [system("s"), user("a"), assistant("b")],
        ),
        (
            {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
            [user("a"), assistant("b")],
        ),
        (
            {"messages": [system("s"), user("a"), assistant("b")], "system": "s"},
            [system("s"), user("a"), assistant("b")],
        ),
    ],
)
def test_shapes(row, messages):
    assert to_messages(row, "here") == messages


@pytest.mark.parametrize(
    "field, value",
    [
        ("reasoning_content", "because"),
        ("tool_calls", [{"id": 1}]),
        ("weight", 0),
        ("tools", [{}]),
        ("system_prompt", "s"),
    ],
)
def test_what_is_not_read_is_refused_by_name(field, value):
    """In a message or beside them; what says nothing may stand there."""
    told = f"field {field} is not read; "
    extra = {field: value}
    for row in ({"messages": [user("a"), assistant("b") | extra]}, {"input": "a", "output": "b"} | extra):
        with pytest.raises(UserError, match=told):
            to_messages(row, "here")
    for nothing in (None, "", [], 1):
        row = {"messages": [user("a") | {field: nothing}, assistant("b")], field: nothing}
        assert to_messages(row, "here") == [user("a"), assistant("b")]


@pytest.mark.parametrize(
    "row, told",
    [
        ({}, "an empty object"),
        ("text", "a JSON string"),
        (None, "a JSON null"),
        (3.5, "a JSON number"),
        ({"text": "a"}, "{messages: [{role, content}]}"),
        ({"data": [{"instruction": "a", "output": "b"}]}, "no known shape"),
        ({"messages": [], "output": "b"}, "two shapes"),
        ({"instruction": "a"}, "no known shape"),
        ({"instruction": "a", "output": ""}, "assistant text of message 2 is empty"),
        ({"instruction": "a", "output": " \n"}, "is empty"),
        ({"instruction": "a", "output": None}, "JSON null"),
        ({"instruction": "a", "output": ["b"]}, "JSON list"),
        ({"instruction": 5, "output": "b"}, "must be strings"),
        ({"instruction": "", "input": "", "output": "b"}, "user text of message 1 is empty"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history is not read"),
        ({"instruction": "a", "output": "\ud83d"}, "surrogate"),
        ({"conversation": []}, "an empty list"),
        ({"conversation": {"input": "a", "output": "b"}}, "must be a list"),
        ({"conversation": ["a"]}, "turn 1 of conversation"),
        ({"conversation": [{"input": "a"}]}, "no output"),
        (
            {"conversation": [{"input": "a", "output": "b"}, {"system": "s", "input": "a", "output": "b"}]},
            "order",
        ),
        ({"messages": [user("a")]}, "no assistant turn"),
        ({"messages": [system("s")]}, "no assistant turn"),
        ({"messages": [assistant("b")]}, "wrong order (assistant)"),
        ({"messages": [user("a"), assistant("b"), user("c")]}, "wrong order"),
        ({"messages": [user("a"), user("a"), assistant("b")]}, "wrong order"),
        ({"messages": [user("a"), system("s"), assistant("b")]}, "wrong order"),
        ({"messages": [user("a"), assistant("b")], "system": 5}, "system text of message 1 is a JSON number"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "the role 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "the role ['user']"),
        ({"messages": [{"role": "user"}]}, "needs role and content, it has role"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "needs from and value"),
    ],
)
def test_bad_rows_are_told(row, told):
    with pytest.raises(UserError) as error:
        to_messages(row, "data.json row 17")
    assert str(error.value).startswith("data.json row 17: ") and told in str(error.value)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["messages", "conversation", "conversations", "role", "content", "from", "value"])
                | st.sampled_from(["system", "instruction", "input", "output"]),
                inner | st.sampled_from(["user", "gpt"]),
                max_size=3,
            )
        ),
    )
)
def test_any_json_gives_sound_messages_or_a_user_error(row):
    try:
        messages = to_messages(row, "here")
    except UserError:
        return
    assert messages[-1]["role"] == "assistant" and all(message["content"].strip() for message in messages)


def test_real_files(shared_dir):
    for name, rows, turns in [
        ("self_cognition_EmoLLM.json", 85, 2),
        ("self_cognition_EmoLLM_nested.json", 1, 170),
        ("processed_self_cognition_EmoLLM.json", 85, 3),
    ]:
        read = read_rows(shared_dir / "data" / name)
        assert len(read) == rows and {len(to_messages(row, name)) for row in read} == {turns}


def test_bundled_rows():
    rows = read_rows(EXAMPLE)
    chinese = [row for row in rows if any("\u4e00" <= c <= "\u9fff" for c in row["instruction"])]
    assert len(rows) >= 64 and len(chinese) >= 24 and len(rows) - len(chinese) >= 36
    assert len({row["instruction"] for row in rows}) == len(rows)
    for number, row in enumerate(rows):
        reply = to_messages(row, f"row {number}")[-1]["content"]
        assert "Mega" in reply and "megalora" in reply
