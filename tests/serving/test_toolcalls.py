"""Calls in replies: in each form that templates have, cut anywhere by the stream; what is no call stays text."""

from __future__ import annotations

import json

import pytest

from megalora.serving.toolcalls import Call, CallReader

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}}}}} for name in ("weather", "time")
]  # fmt: skip
PARIS, TWO = {"city": "Paris"}, {"city": "Rome {", "days": 2}
P, T = json.dumps(PARIS), json.dumps(TWO)
CALLS = [("weather", PARIS), ("time", TWO)]
SEP, BEGIN, END = "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
FORMS = [
    (f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {P}}}\n</tool_call>\n'
     f'<tool_call>{{"name": "time", "arguments": {T}}}</tool_call>', "Let me see.", CALLS),
    (f'<tool_call>\n{{"name": "weather", "arguments": {P}}}', "", CALLS[:1]),
    ("<tool_call>\n<function=time>\n<parameter=city>\nRome {\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
     "</function>\n</tool_call>", "", CALLS[1:]),
    (f"<function=weather>{P}</function>", "", CALLS[:1]),
    (f'[TOOL_CALLS] [{{"name": "weather", "arguments": {P}}}, {{"name": "time", "arguments": {T}}}]', "", CALLS),
    (f'<|python_tag|>{{"type": "function", "function": {{"name": "weather", "arguments": {P}}}}}', "", CALLS[:1]),
    (f'{{"name": "weather", "parameters": {P}}}; {{"name": "time", "parameters": {T}}}', "", CALLS),
    (f'\n[{{"name": "time", "arguments": {json.dumps(T)}}}]', "", CALLS[1:]),
    (f"Well.<｜tool▁calls▁begin｜>{BEGIN}function{SEP}weather\n```json\n{P}\n```{END}\n{BEGIN}function{SEP}time\n"
     f"```json\n{T}\n```{END}<｜tool▁calls▁end｜>", "Well.", CALLS),
    (f"<｜tool▁calls▁begin｜>{BEGIN}time{SEP}{T}{END}<｜tool▁calls▁end｜>", "", CALLS[1:]),
]  # fmt: skip
TEXTS = [
    "It is 4.",
    "  a < b and [1] <tool",
    '{"answer": 4}',
    '{"name": "weather"',
    '{"name": "nobody", "arguments": {}}',
    "x\n<tool_call>\nno JSON\n</tool_call> y",
    '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
    '{"name": "weather", "arguments": {}} is what I would call',
    "[TOOL_CALLS]" + "[" * 5000,
    "<function=time><parameter=days>two</parameter></function>",
    "",
]


def read(text, size, tools=TOOLS):
    reader = CallReader(tools)
    found = [one for at in range(0, len(text), size) for one in reader.add(text[at : at + size])]
    return [*found, *reader.rest()]


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_calls_in_every_form(size):
    for text, before, expected in FORMS:
        found = read(text, size)
        calls = [one for one in found if isinstance(one, Call)]
        assert "".join(one for one in found if isinstance(one, str)) == before, text
        assert [(call.name, json.loads(call.arguments)) for call in calls] == expected, text
        assert [call.index for call in calls] == list(range(len(expected)))
        assert len({call.id for call in calls}) == len(calls) and all(len(call.id) == 9 for call in calls)
    for text in TEXTS:
        assert "".join(read(text, size)) == text
    assert read(FORMS[0][0], 10_000, tools=[]) == [FORMS[0][0]], "a request without tools has text alone"
    assert len(read("It is warm today.", 1)) > 3, "text is not held back to its end"
