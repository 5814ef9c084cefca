"""Rows as the files of the field have them, through each template in use: what is trained, written by hand.

The rows have the shapes of LLaMA-Factory's demo files, of EmoLLM's and of OpenAI's; their words are ours.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from chat_templates import make, trained

from megalora.data import to_conversation
from megalora.data.template import ChatTemplate
from megalora.data.toolcalls import with_short_ids
from megalora.errors import UserError


def parts(*texts, **of_kind):
    return [{"type": kind, "value": text} for kind, text in [*of_kind.items(), *(("text", text) for text in texts)]]


TOOL = {"name": "find", "description": "finds", "parameters": {"type": "object", "properties": {"q": {}}}}
CALL = '{"name": "find", "arguments": {"q": "x"}}'
OPENAI = [
    {"id": f"call_{n}4Jkl0Mnop", "type": "function", "function": {"name": "find", "arguments": f'{{"q": {n}}}'}}
    for n in (1, 2)
]
ROWS = {
    "alpaca": {"instruction": "a", "input": "x", "output": "b"},
    "identity, zh": {"instruction": "你是谁？", "input": "", "output": "我是 {{name}}，请多指教。"},
    "alpaca with history": {"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]},
    "EmoLLM": {"conversation": [{"system": "s", "input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
    "EmoLLM's swift": {"query": "c", "response": "d", "history": [["a", "b"]]},
    "v1_sft": {
        "messages": [
            {"role": "user", "content": parts("a"), "loss_weight": 0.0},
            {"role": "assistant", "content": parts("b"), "loss_weight": 1.0},
        ]
    },
    "glaive": {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": CALL},
            {"from": "observation", "value": '{"found": 7}'},
            {"from": "gpt", "value": "b"},
        ],
        "tools": json.dumps([TOOL]),
    },
    "reason_tool_use": {
        "messages": [
            {"role": "system", "content": parts("s")},
            {"role": "user", "content": parts("a")},
            {"role": "assistant", "content": parts(reasoning="hm", tool_call=CALL)},
            {"role": "tool", "content": parts('{"found": 7}')},
            {"role": "assistant", "content": parts("b", reasoning="so")},
        ],
        "tools": json.dumps([{"type": "function", "function": TOOL}]),
    },
    "OpenAI": {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": OPENAI},
            *({"role": "tool", "tool_call_id": call["id"], "content": '{"found": 7}'} for call in OPENAI),
            {"role": "assistant", "content": "b", "weight": 1},
        ],
        "tools": [{"type": "function", "function": TOOL}],
        "parallel_tool_calls": True,
    },
}


class Expected(NamedTuple):
    """What a template makes of the rows.

    reply   a reply without thinking, as it is trained
    alone   whether each reply is a document of its own
    system  whether there is a system message
    one, two  the calls of glaive's row and of OpenAI's; else the reason for which they are refused
    thinks  a reply with the thinking and the text that are put in
    reason  the two replies of reason_tool_use, else the reason for which they are refused
    """

    reply: str
    alone: bool = False
    system: bool = True
    one: str = "does not print tools"
    two: str = "does not print tools"
    thinks: str = "<think>\n{}\n</think>\n\n{}"
    reason: tuple[str, ...] | str = "does not print tools"


DEEPSEEK, QWEN = "{}<｜end▁of▁sentence｜>", "<tool_call>\n{}\n</tool_call>"
ONE = QWEN.format(CALL)
TWO = "\n".join(QWEN.format(f'{{"name": "find", "arguments": {{"q": {n}}}}}') for n in (1, 2))
LLAMA = Expected(
    "{}<|eot_id|>",
    one='{"name": "find", "parameters": {"q": "x"}}<|eot_id|>',
    two="only single tool-calls at once",
    reason="drops the thinking of message 3, which calls tools",
)
IDS = "A5ACON52B", "QVLIRI6A3", "G3HHTSQ6P"  # of the calls, from their hash
TEMPLATES = {
    "chatml": Expected("{}<|im_end|>"),
    "phi3": Expected("{}<|end|>"),
    "gemma": Expected("{}<end_of_turn>", system=False),
    "deepseek_v3": Expected(DEEPSEEK),
    "r1_first": Expected(DEEPSEEK),  # of R1-Distill-Qwen and -Llama as they came out
    "r1": Expected("\n</think>\n\n" + DEEPSEEK, alone=True, thinks="{}\n</think>\n\n{}"),  # and as they are now
    "llama31": LLAMA,
    "llama32": LLAMA,
    "mistral_v3": Expected(
        " {}</s>",
        one=f'[TOOL_CALLS] [{CALL[:-1]}, "id": "{IDS[0]}"}}]</s>',
        two='[TOOL_CALLS] [{{"name": "find", "arguments": {{"q": 1}}, "id": "{}"}}, '
        '{{"name": "find", "arguments": {{"q": 2}}, "id": "{}"}}]</s>'.format(*IDS[1:]),
        reason="drops the system text",  # it prints it in a last question alone, not before the result of a tool
    ),
    "qwen25": Expected(
        "{}<|im_end|>",
        one=f"{ONE}<|im_end|>",
        two=f"{TWO}<|im_end|>",
        reason=(f"<think>\nhm\n</think>\n\n\n{ONE}<|im_end|>", "<think>\nso\n</think>\n\nb<|im_end|>"),
    ),
    "qwen3": Expected(
        "<think>\n\n</think>\n\n{}<|im_end|>",
        alone=True,
        one=f"<think>\n\n</think>\n\n{ONE}<|im_end|>",
        two=f"<think>\n\n</think>\n\n{TWO}<|im_end|>",
        reason=(f"<think>\nhm\n</think>\n\n{ONE}<|im_end|>", "<think>\nso\n</think>\n\nb<|im_end|>"),
    ),
}


def expected(of: Expected, kind: str) -> list[list[str]] | str:
    """The trained texts of each document of a row; a text: the reason for which it is refused."""
    if kind == "reason_tool_use":
        return of.reason if isinstance(of.reason, str) else [list(of.reason)]
    if kind in ("glaive", "OpenAI"):
        call = of.one if kind == "glaive" else of.two
        if not call.endswith(">"):
            return call
        texts = [call, of.reply.format("b")]
    else:
        if kind in ("alpaca with history", "EmoLLM") and not of.system:
            return "System role not supported"
        said = {"identity, zh": [ROWS["identity, zh"]["output"]], "alpaca": "b", "v1_sft": "b"}.get(kind, "bd")
        texts = [of.reply.replace("{}", text) for text in said]
    return [[text] for text in texts] if of.alone else [texts]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_of_each_kind_of_row(name):
    """And the tokens are those of transformers, where a row is one document of the template's own text."""
    template, compared = make(name), 0
    for kind, row in ROWS.items():
        conversation, wanted = to_conversation(row, "row 0"), expected(TEMPLATES[name], kind)
        if isinstance(wanted, str):
            with pytest.raises(UserError, match=wanted):
                template.documents(conversation)
            continue
        assert trained(template, conversation) == wanted, kind
        if len(wanted) == 1 and (name, kind) not in NOT_AS_PRINTED:
            equal_to_transformers(template, conversation)
            compared += 1
    assert compared >= 2 or name == "r1"


# The system text is in the last question alone, which transformers' text of a whole conversation has no more.
NOT_AS_PRINTED = {("mistral_v3", "alpaca with history"), ("mistral_v3", "EmoLLM")}
NOT_AS_PRINTED |= {("r1", kind) for kind in ROWS}  # it does not print the thinking that generation begins in


def equal_to_transformers(template: ChatTemplate, conversation) -> None:
    spoken, tokenizer = with_short_ids(conversation), template.tokenizer
    if "reasoning_content" in template.source:
        messages = [message.to_dict() for message in spoken.messages]
    else:
        messages = [message.with_thinking_in_content().to_dict() for message in spoken.messages]
    tools = list(spoken.tools) or None
    theirs = tokenizer.apply_chat_template(messages, tools=tools, chat_template=template.source)["input_ids"]
    (ours,) = template.encode(conversation)
    assert ours.input_ids.tolist() == theirs[: len(ours.input_ids)]
    assert not tokenizer.decode(theirs[len(ours.input_ids) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_thinking_in_a_field_or_in_the_text(name):
    of, thought = TEMPLATES[name], "<think>\nhm\n</think>\n\nb"
    wanted = of.reply.removeprefix("\n</think>\n\n").removeprefix("<think>\n\n</think>\n\n")
    for row in ({"instruction": "a", "output": thought}, {"question": "a", "answer": "b", "reasoning": "hm"}):
        (document,) = trained(make(name), to_conversation(row, "row 0"))
        assert document == [wanted.format(of.thinks.format("hm", "b"))]


def test_preference_rows_are_refused_by_name():
    chat = [{"from": "human", "value": "a"}]
    for row, told in [
        ({"conversations": chat, "chosen": {"from": "gpt", "value": "b"}, "rejected": {}}, "preference rows \\(DPO\\)"),
        ({"chosen_messages": chat, "rejected_messages": chat}, "preference rows \\(DPO\\)"),
        ({"conversations": [*chat, {"from": "gpt", "value": "b"}], "label": True}, "\\(KTO\\)"),
        ({"conversations": [*chat, {"from": "gpt", "value": "b"}], "kto_tag": False}, "--ignore_columns kto_tag"),
    ]:
        with pytest.raises(UserError, match=told):
            to_conversation(row, "row 0")
