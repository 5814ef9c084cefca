"""Formats: every shape of a row gives the same messages, and no field is lost."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from megalora.data import read_rows, to_conversation, to_question
from megalora.data.conversation import Conversation, Message
from megalora.data.fields import HARMLESS, FieldNames, shown
from megalora.errors import UserError

TWICE = [{"name": "f", "arguments": '{"x": 1, "x": 2}'}]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "data" / "self_cognition.json"


def to_messages(row, where):
    return to_conversation(row, where).to_dicts()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


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
        ("label", False),
        ("images", ["a.png"]),
        ("context", "c"),
        ("refusal", "no"),
        ("chosen", "c"),
        ("training_detail", [{"begin": 0}]),
        ("anything", 0),
        ("\ud83d", "half of a pair"),
    ],
)
def test_what_is_not_read_is_refused_by_name(field, value):
    """In a message, an exchange or beside them; what says nothing may stand there."""
    told = f"field {shown(field)} is not read: "
    extra = {field: value}
    for row in (
        {"messages": [user("a"), assistant("b") | extra]},
        {"conversation": [{"input": "a", "output": "b"} | extra]},
        {"input": "a", "output": "b"} | extra,
        {"text": "a"} | extra,
    ):
        with pytest.raises(UserError, match=re.escape(told)) as error:
            to_messages(row, "here")
        str(error.value).encode()
    for nothing in (None, "", [], {}):
        row = {"messages": [user("a") | {field: nothing}, assistant("b")], field: nothing}
        assert to_messages(row, "here") == [user("a"), assistant("b")]


@pytest.mark.parametrize(
    "row, told",
    [
        ({}, "an empty object"),
        ("text", "a JSON string"),
        (None, "a JSON null"),
        (3.5, "a JSON number"),
        ({"words": "a"}, "{messages: [{role, content}]}"),
        ({"data": [{"instruction": "a", "output": "b"}]}, "no known shape"),
        ({"messages": [], "output": "b"}, "two shapes"),
        ({"instruction": "a"}, "no known shape"),
        ({"instruction": "a", "output": ""}, "assistant text (output) is empty"),
        ({"instruction": "a", "output": " \n"}, "is empty"),
        ({"instruction": "a", "output": None}, "is empty"),
        ({"instruction": "a", "output": ["b"]}, "JSON list"),
        ({"instruction": 5, "output": "b"}, "a JSON number: make both strings"),
        ({"instruction": "", "input": "", "output": "b"}, "user text is empty"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history is not a list of pairs"),
        ({"instruction": "a", "output": "b", "history": [["c", " "]]}, "text of the history is empty"),
        ({"instruction": "a", "output": "b", "answer": "c"}, "output and answer stand for the same thing"),
        ({"instruction": "a", "prompt": "b", "output": "c"}, "instruction and prompt stand for the same thing"),
        ({"messages": [user("a"), assistant("b")], "instruction": "c"}, "field instruction is not read"),
        ({"messages": [system("t"), user("a"), assistant("b")], "system": "s"}, "two system texts"),
        ({"instruction": "a", "output": "\ud83d"}, "surrogate"),
        ({"conversation": []}, "an empty list"),
        ({"conversation": {"input": "a", "output": "b"}}, "give a list of turns"),
        ({"conversation": ["a"]}, "turn 1 of conversation is a JSON string: make it an object"),
        ({"conversation": [{"input": "a"}]}, "no output"),
        ({"messages": [user("a")]}, "no assistant turn"),
        ({"messages": [system("s")]}, "no assistant turn"),
        ({"messages": [assistant("b")]}, "wrong order (assistant)"),
        ({"messages": [user("a"), assistant("b"), user("c")]}, "wrong order"),
        ({"messages": [user("a"), user("a"), assistant("b")]}, "wrong order"),
        ({"messages": [user("a"), system("s"), assistant("b")]}, "wrong order"),
        ({"messages": [user("a"), assistant("b")], "system": 5}, "the system text is a JSON number"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "the role 'narrator'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "the role ['user']"),
        ({"messages": [{"role": "user"}]}, "has role: give it role and content, or from and value"),
        ({"conversations": [{"says": "x"}]}, "has says: give it role and content, or from and value"),
        ({"messages": [user("a"), {"role": "tool", "content": "x"}, assistant("b")]}, "wrong order (user tool"),
        ({"messages": [user("a"), assistant("b") | {"weight": -1}]}, "weight is '-1': give 0, or a number from"),
        ({"messages": [user("a"), assistant("b") | {"weight": float("nan")}]}, "weight is 'nan': give 0, or"),
        ({"messages": [user("a"), assistant("b") | {"train": 0.5}]}, "train is '0.5': give true or false"),
        (
            {"messages": [user("a"), assistant("b"), {"role": "tool", "content": "r", "train": True}, assistant("b")]},
            "message 3: the result of a tool is never trained",
        ),
        ({"messages": [user("a"), assistant("b") | {"train": False, "weight": 0.5}]}, "train and weight contradict"),
        ({"messages": [user("a"), assistant("b") | {"train": True, "masked": True}]}, "contradict each other"),
        ({"messages": [user("a") | {"thinking": "hm"}, assistant("b")]}, "a user message has thinking"),
        ({"messages": [user("a"), assistant("<think>x</think>b") | {"thinking": "hm"}]}, "has thinking twice"),
        ({"messages": [user("a"), assistant([{"type": "image_url", "image_url": {}}])]}, "part of type 'image_url'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference rows"),
        ({"conversations": [user("a"), {"from": "function_call", "value": "{"}]}, "the function call is not JSON"),
        ({"messages": [user("a"), assistant("b")], "tools": [{"type": "retrieval"}]}, "a tool has the fields type"),
        ({"messages": [user("a"), assistant("b")], "tools": "x"}, "tools is not JSON"),
        ({"messages": [user("a"), {"role": "assistant", "tool_calls": TWICE}]}, "the field 'x' twice"),
    ],
)
def test_bad_rows_are_told(row, told):
    with pytest.raises(UserError) as error:
        to_messages(row, "data.json row 17")
    assert str(error.value).startswith("data.json row 17: ") and told in str(error.value)


@examples(200)
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
        conversation = to_conversation(row, "here")
    except UserError as error:
        str(error).encode()
        return
    messages = conversation.messages
    assert (conversation.text is not None) or messages[-1].role == "assistant"
    assert all(message.content.strip() or message.role in ("system", "tool") for message in messages)


def test_real_files(shared_dir):
    for name, rows, turns in [
        ("self_cognition_EmoLLM.json", 85, 2),
        ("self_cognition_EmoLLM_nested.json", 1, 170),
        ("processed_self_cognition_EmoLLM.json", 85, 3),
    ]:
        read = list(read_rows(shared_dir / "data" / name))
        assert len(read) == rows and {len(to_messages(row, name)) for row in read} == {turns}


def test_bundled_rows():
    rows = list(read_rows(EXAMPLE))
    chinese = [row for row in rows if any("\u4e00" <= c <= "\u9fff" for c in row["instruction"])]
    assert len(rows) >= 64 and len(chinese) >= 24 and len(rows) - len(chinese) >= 36
    assert len({row["instruction"] for row in rows}) == len(rows)
    for number, row in enumerate(rows):
        reply = to_messages(row, f"row {number}")[-1]["content"]
        assert "Mega" in reply and "megalora" in reply


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
TOLD = '{"name": "f", "arguments": {"x": 1}}'
CALLED = (
    Message("user", "a"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "r"),
    Message("assistant", "b"),
)


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"prompt": "a", "completion": "b"}, "ab"),
        ({"prompt": "a", "response": "b"}, "ab"),
        ({"question": "a", "answer": "b"}, "ab"),
        ({"query": "c", "response": "d", "history": [["a", "b"]]}, "abcd"),
        ({"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "s"}, "sabcd"),
        ({"instruction": "c", "output": "d", "history": [user("a"), assistant("b")]}, "abcd"),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, "ab"),
        ({"conversations": [user("a"), assistant("b")]}, "ab"),
        ({"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "ab"),
        ({"conversation": [{"query": "a", "response": "b"}, {"query": "c", "response": "d"}]}, "abcd"),
        ({"messages": [{"role": "developer", "content": "s"}, user("a"), assistant("b")]}, "sab"),
        ({"messages": [{"role": "User", "content": "a"}, {"role": " Model ", "content": "b"}]}, "ab"),
        ({"messages": [{"role": "Human", "content": "a"}, {"role": "ChatGPT", "content": "b"}]}, "ab"),
        ({"messages": [user([{"type": "text", "text": "a"}]), assistant([{"type": "text", "value": "b"}])]}, "ab"),
        ({"messages": '[{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]'}, "ab"),
        ({"messages": [user("a"), assistant("b")], "system_message": "s"}, "sab"),
        ({"messages": [user("a"), assistant("b")], "prompt": "a"}, "ab"),
    ],
)
def test_more_shapes(row, messages):
    roles = {"s": "system", "a": "user", "c": "user", "b": "assistant", "d": "assistant"}
    assert to_conversation(row, "here") == Conversation(tuple(Message(roles[text], text) for text in messages))


def test_systems():
    several = [system("s"), system("t"), user("a"), assistant("b"), system("u"), user("c"), assistant("d")]
    assert to_messages({"messages": several}, "here") == several
    empty = [system(""), user("a"), assistant("b")]
    assert to_messages({"messages": empty}, "here") == empty
    changed = [{"input": "a", "output": "b"}, {"system": "s", "input": "a", "output": "b"}]
    roles = [message["role"] for message in to_messages({"conversation": changed}, "here")]
    assert roles == ["user", "assistant", "system", "user", "assistant"]


def test_text():
    assert to_conversation({"text": "a\n"}, "here") == Conversation(text="a\n")
    with pytest.raises(UserError, match="two shapes"):
        to_conversation({"text": "a", "messages": [user("a"), assistant("b")]}, "here")


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking(name):
    thought = (Message("user", "a"), Message("assistant", "b", "hm"))
    for row in (
        {"messages": [user("a"), assistant("b") | {name: "hm"}]},
        {"instruction": "a", "output": "b", name: "hm"},
        {"conversation": [{"input": "a", "output": "b", name: "hm"}]},
        {"messages": [user("a"), assistant([{"type": name, name: "hm"}, {"type": "text", "text": "b"}])]},
    ):
        assert to_conversation(row, "here").messages == thought
    assert thought[1].with_thinking_in_content().content == "<think>\nhm\n</think>\n\nb"


@pytest.mark.parametrize(
    "turns",
    [
        [user("a"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "r"}, assistant("b")],
        [
            user("a"),
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "content": "r"},
            assistant("b"),
        ],
        [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": TOLD},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "b"},
        ],
        [
            user("a"),
            assistant([{"type": "tool_call", "value": TOLD}]),
            {"role": "tool", "content": [{"type": "text", "value": "r"}]},
            assistant("b"),
        ],
    ],
)
@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], '[{"name": "f", "description": "d", "parameters": {}}]'])
def test_tools_in_every_shape(turns, tools):
    assert to_conversation({"conversations": turns, "tools": tools}, "here") == Conversation(CALLED, (TOOL,))
    assert to_conversation({"messages": turns, "functions": tools}, "here").tools == (TOOL,)


def test_parallel_calls_and_words_before_them():
    turns = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "I look."},
        {"from": "function_call", "value": f"<think>hm</think>[{TOLD}, {TOLD}]"},
        {"from": "observation", "value": {"r": "\u00e9"}},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "b"},
    ]
    found = to_conversation({"conversations": turns}, "here").messages
    assert found[1] == Message("assistant", "I look.", "hm", (CALL, CALL))
    assert [message.content for message in found[2:]] == ['{"r": "\u00e9"}', "2", "b"]
    for nothing in (None, "", "{}", {}):
        called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": nothing}}]}
        (call,) = to_conversation({"messages": [user("a"), called]}, "here").messages[1].tool_calls
        assert call["function"] == {"name": "f", "arguments": {}}
    named = {"role": "tool", "content": "r", "name": "f", "tool_call_id": "7"}
    row = {"messages": [user("a"), {"role": "assistant", "tool_calls": [CALL | {"id": "7"}]}, named, assistant("b")]}
    dicts = to_messages(row, "here")
    assert dicts[1] == {"role": "assistant", "content": None, "tool_calls": [{"id": "7", **CALL}]}
    assert dicts[2] == named


def test_masks_of_turns():
    for field, off in [("train", False), ("weight", 0), ("loss_weight", 0.0), ("masked", True)]:
        on = type(off)(not off)
        row = {"messages": [user("a"), assistant("b") | {field: off}, user("c"), assistant("d") | {field: on}]}
        trained = [message.trained for message in to_conversation(row, "here").messages]
        assert trained == [None, False, None, True]
    whole = to_conversation({"instruction": "a", "output": "b", "weight": 0}, "here")
    assert [message.trained for message in whole.resolve("all").messages] == [False, False]


def test_weights_of_turns():
    """Of a message, of an exchange, and of the row, which multiplies."""
    turns = [user("a"), assistant("b") | {"weight": 0.5}, user("c") | {"weight": 2}, assistant("d")]
    exchanges = [{"input": "a", "output": "b", "loss_weight": 0.5}, {"input": "c", "output": "d"}]

    def weights(row, rule="all"):
        messages = to_conversation(row, "here").resolve(rule).messages
        return [message.weight if message.trained else 0 for message in messages]

    assert weights({"messages": turns}) == [0, 0.5, 2, 1]
    assert weights({"messages": turns, "weight": 3}, "prompt") == [3, 1.5, 6, 3]
    assert weights({"messages": [user("a"), assistant("b") | {"train": True, "weight": 0.5}]}) == [0, 0.5]
    assert weights({"conversation": exchanges}) == [0, 0.5, 0, 1]
    assert weights({"conversation": exchanges, "weight": 2}, "last") == [0, 1, 0, 2]
    assert weights({"instruction": "a", "output": "b", "loss_scale": 0.25}, "prompt") == [0.25, 0.25]
    assert weights({"conversation": exchanges, "weight": 0}) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "row, told",
    [
        ({"prompt": "a", "max_tokens": 3}, "field max_tokens is not read: take it out of the row"),
        ({"prompt": "a", "label": True}, "field label is not read: take it out of the row"),
        ({"prompt": "a", "input_ids": [1]}, "field input_ids is not read: rows are tokenised here"),
        ({"prompt": "a", "query": "b"}, "prompt and query stand for the same thing: keep one"),
        ({"text": "a"}, "no known shape"),
    ],
)
def test_hints_of_prompts_name_no_flags_and_shapes_that_they_lack(row, told):
    """--columns and --ignore_columns are flags of training alone, and a text without turns asks for no reply."""
    with pytest.raises(UserError) as error:
        to_question(row, "here")
    assert told in str(error.value) and "columns" not in str(error.value) and "{text}" not in str(error.value)


def test_messages_before_one_reply_that_count_for_different_weights_are_refused():
    """They are trained as one text, which would count for the least of them: a word of the row would be lost."""
    trained = user("a") | {"train": True}
    for row in (
        {"messages": [system("s"), trained, assistant("b")]},
        {"messages": [trained, assistant("b")], "system": "s"},
        {"messages": [system("s") | {"weight": 2}, user("a") | {"weight": 1}, assistant("b")]},
        {"messages": [user("a"), assistant("b"), system("s") | {"train": True}, user("c"), assistant("d")]},
    ):
        with pytest.raises(UserError, match="count for different weights"):
            to_conversation(row, "here").resolve("all")
    sound = [
        ({"messages": [trained, assistant("b")]}, "all"),
        ({"messages": [system("s"), trained, assistant("b")]}, "prompt"),
        ({"messages": [system("s"), user("a"), assistant("b"), trained, assistant("b")]}, "last"),
        ({"messages": [system("s"), user("a") | {"train": False}, assistant("b")]}, "prompt"),
    ]
    for row, rule in sound:
        to_conversation(row, "here").resolve(rule)


def test_weights_and_masks_written_as_text():
    """As a column of a CSV file holds them."""
    for row, trained, weight in (
        ({"train": "false"}, False, 1.0),
        ({"masked": "TRUE"}, False, 1.0),
        ({"train": "1", "weight": ""}, None, 1.0),
        ({"weight": " 0.5 "}, None, 0.5),
    ):
        message = to_conversation({"instruction": "a", "output": "b"} | row, "here").messages[-1]
        assert (message.trained, message.weight if trained is None else 1.0) == (trained, weight)
    thinking = {"instruction": "a", "output": "b", "enable_thinking": "False"}
    assert to_conversation(thinking, "here").template_kwargs == {"enable_thinking": False}
    for word in ("no", "nan", '"1"', "[1]", "-1"):
        with pytest.raises(UserError, match="weight is "):
            to_conversation({"instruction": "a", "output": "b", "weight": word}, "here")


@pytest.mark.parametrize(
    "rule, trained",
    [("all", [0, 0, 1, 0, 0, 1]), ("last", [0, 0, 0, 0, 0, 1]), ("prompt", [1, 1, 1, 1, 0, 1])],
)
def test_the_rule_of_the_run(rule, trained):
    roles = ("system", "user", "assistant", "user", "tool", "assistant")
    conversation = Conversation(tuple(Message(role, "x") for role in roles)).resolve(rule)
    assert [message.trained for message in conversation.messages] == [bool(flag) for flag in trained]


def test_variables_of_the_template():
    row = {"messages": [user("a"), assistant("b")], "chat_template_kwargs": {"x": 1}, "enable_thinking": False}
    assert to_conversation(row, "here").template_arguments() == {"x": 1, "enable_thinking": False}
    with pytest.raises(UserError, match="may not set tools"):
        to_conversation(row | {"chat_template_kwargs": {"tools": []}}, "here")


def test_columns_of_the_user():
    names = FieldNames({"ask": "instruction", "reply": "output", "who": "role", "said": "content"}, frozenset({"n"}))
    seen = Counter()
    row = {"ask": "a", "reply": "b", "n": 3}
    assert to_conversation(row, "here", names, seen).to_dicts() == [user("a"), assistant("b")]
    turns = [{"who": "user", "said": "a"}, {"who": "gpt", "said": "b"}]
    assert to_conversation({"messages": turns}, "here", names, seen).to_dicts() == [user("a"), assistant("b")]
    assert seen == {"column ask": 1, "column reply": 1, "column who": 2, "column said": 2, "ignored n": 1, "field n": 1}
    with pytest.raises(UserError, match="--columns output=reply, but the row has a field output beside reply"):
        to_conversation({"ask": "a", "reply": "b", "output": "c"}, "here", names)


def test_a_shape_that_is_not_known_is_told_by_the_names_that_the_flags_give():
    """Else a slip in --columns, or an --ignore_columns too many, is not seen in the message."""
    row = {"instruction": "a", "input": "", "output": "b"}
    for names, told in (
        (FieldNames({"output": "outputt"}), "(fields instruction, input, outputt)"),
        (FieldNames({}, frozenset({"output"})), "(fields instruction, input)"),
    ):
        with pytest.raises(UserError, match="no known shape") as error:
            to_conversation(row, "here", names)
        assert told in str(error.value)


ROWS = [
    {"instruction": "a", "input": "x", "output": "b"},
    {"conversation": [{"system": "s", "input": "a", "output": "b"}]},
    {"messages": [user("a"), assistant([{"type": "text", "text": "b"}])], "tools": [TOOL]},
    {"conversations": [user("a"), {"role": "assistant", "tool_calls": [CALL]}]},
    {"query": "a", "response": "b", "history": [user("c"), assistant("d")]},
    {"text": "a"},
]


def objects(value, path=()):
    """The paths of all objects of a row whose fields have a meaning here: not those of a declared tool or arguments."""
    if isinstance(value, dict):
        yield path
        for name, inner in value.items():
            if name not in ("tools", "arguments"):
                yield from objects(inner, (*path, name))
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from objects(inner, (*path, index))


def with_field(value, path, name, extra):
    if not path:
        return value | {name: extra}
    copy = list(value) if isinstance(value, list) else dict(value)
    copy[path[0]] = with_field(value[path[0]], path[1:], name, extra)
    return copy


values = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([(row, path) for row in ROWS for path in objects(row)]),
    st.text(max_size=8) | st.sampled_from([*sorted(HARMLESS)[::7], "train", "thinking", "system", "label", "tools"]),
    values,
)
def test_a_field_is_read_or_refused_or_listed(place, name, value):
    """One more field anywhere: nothing that it says is lost."""
    row, path = place
    plain, seen = to_conversation(row, "here"), Counter()
    try:
        found = to_conversation(with_field(row, path, name, value), "here", None, seen)
    except UserError as error:
        str(error).encode()
        return
    listed = any(field.endswith(shown(name)) for field in seen if field.startswith("field "))
    says_nothing = value in ("", [], {}) and value is not False
    harmless_default = name in ("index", "type") and path  # of a tool call or a part
    neutral = isinstance(value, str) and not value.strip()  # a blank system text or thinking
    trained_anyway = name == "train" and value in (True, 1)  # read, and what holds without it
    silent = says_nothing or harmless_default or neutral or trained_anyway
    assert found != plain or listed or silent or already(row, path, name, value)


def already(row, path, name, value):
    """The field was there and says the same."""
    for step in path:
        row = row[step]
    return row.get(name) == value
