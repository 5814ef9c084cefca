"""Turns: one object of a list of turns -> messages. Roles, text parts, thinking, tool calls and per-turn masks.

Two kinds of turn are known: a message with a role ({role, content} or {from, value}), and an exchange, a question and
its reply in one object ({instruction?, input?, output}, {query, response}, ...).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..errors import UserError
from ..files import unique_fields
from .conversation import Message
from .fields import Fields, empty, json_type, names_of

ROLE_FIELDS = ("role", "from")
TEXT_FIELDS = ("content", "value")
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
QUESTION_FIELDS = ("instruction", "prompt", "query", "question")
REPLY_FIELDS = ("output", "completion", "response", "answer")
THINKING_FIELDS = ("reasoning_content", "thinking", "reasoning")
TOOL_FIELDS = ("tools", "functions")
LIST_FIELDS = ("messages", "conversations", "conversation")

_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "ai", "llm"),
    "tool": ("tool", "observation", "function", "ipython", "tool_response", "function_response", "tool_result"),
    "call": ("function_call", "tool_call"),
}
ROLES = {name: role for role, names in _ROLES.items() for name in names}

_TRAINED_FIELDS = ("train", "trained", "trainable", "loss")
_MASKED_FIELDS = ("masked", "mask")
_WEIGHT_FIELDS = ("weight", "loss_weight", "loss_scale")
_SMALLEST_WEIGHT, _LARGEST_WEIGHT = 1e-6, 1e3  # float32 holds what lies between, and sums of it


def is_message(fields: Fields) -> bool:
    """Return whether an object of a list of turns is a message with a role, not an exchange."""
    exchange = (*QUESTION_FIELDS, "input", *REPLY_FIELDS)
    return bool(fields.present((*ROLE_FIELDS, *TEXT_FIELDS))) or not fields.present(exchange)


def read_message(fields: Fields, tools: list[dict[str, Any]]) -> Message:
    """Return the message of a turn {role, content}; tools that a system message declares are added to `tools`.

    Raises UserError (naming `fields.place`) for an unknown role, a text that is not one, a field that is not read.
    """
    name, role = _role(fields)
    text, thinking, calls = _parts(fields.take(*TEXT_FIELDS), f"{fields.place}: the {name} text", fields, role)
    if text.strip() and not (fields.left() or thinking or calls) and role != "call":  # nearly all turns
        return Message(role, text)
    thinking = _one_thinking(fields, thinking, text)
    calls += tool_calls(fields.take("tool_calls"), fields.place)
    call = fields.take("function_call")
    calls += tool_calls([call], fields.place) if call is not None else []
    if role == "call":
        role = "assistant"
        text, inner, written = _written_calls(text, fields.place)
        thinking, calls = thinking or inner, calls + written
    if role == "system":
        tools += read_tools(fields.take(*TOOL_FIELDS), fields.place)
    weight = weight_of(fields)
    extra = {key: fields.take(key) for key in ("name", "tool_call_id") if key in fields}
    extra = {key: value for key, value in extra.items() if value is not None}
    if role != "tool" and "name" in extra:  # few templates print it
        fields.note("name", extra["name"])
    for key, value in extra.items():
        check_text(value, f"{fields.place}: {key}")
    if role != "assistant" and (calls or thinking is not None):
        what = "tool calls" if calls else "thinking"
        raise UserError(
            f"{fields.place}: a {role} message has {what}", "give it to the assistant's message, or remove it"
        )
    if role in ("user", "assistant") and not text.strip() and not calls and thinking is None:
        raise UserError(f"{fields.place}: the {name} text is empty", "fill it in or remove the row")
    fields.finish([text])
    if role == "tool" and weight:
        raise UserError(f"{fields.place}: the result of a tool is never trained", "leave its train or weight out")
    return weighted(Message(role, text, thinking, tuple(calls), extra=extra), weight)


def read_exchange(fields: Fields, *, reply_needed: bool) -> list[Message]:
    """Return the user's message and the reply of an exchange; with `reply_needed` False the reply may be missing.

    The user's text is the instruction (prompt, query, question), and the input on the next line. `fields` is not
    finished: there may be more in the object.
    """
    parts = [fields.take(*QUESTION_FIELDS), fields.take("input")]
    for part in parts:
        if part is not None and not isinstance(part, str):
            kind = json_type(part)
            raise UserError(f"{fields.place}: instruction or input is a JSON {kind}", "make both strings")
    text = "\n".join(part for part in parts if part)
    if not text.strip():
        raise UserError(f"{fields.place}: the user text is empty", "fill it in or remove the row")
    check_text(text, f"{fields.place}: the user text")
    question = Message("user", text)
    if not fields.present(REPLY_FIELDS):
        if reply_needed:
            left = names_of(fields.left())
            raise UserError(f"{fields.place}: a turn has no output (its other fields: {left})", "add the reply")
        return [question]
    name = fields.present(REPLY_FIELDS)[0]
    reply = fields.take(*REPLY_FIELDS)
    if reply is None and not reply_needed:
        return [question]
    if not isinstance(reply, str) or not reply.strip():
        what, hint = "is empty", "fill it in or remove the row"
        if reply is not None and not isinstance(reply, str):
            what, hint = f"is a JSON {json_type(reply)}", "make it a string"
        raise UserError(f"{fields.place}: the assistant text ({name}) {what}", hint)
    check_text(reply, f"{fields.place}: the assistant text")
    return [question, Message("assistant", reply, _one_thinking(fields, [], reply))]


def system_text(fields: Fields) -> str | None:
    """Return the text of a system field, None where there is none."""
    text = fields.take(*SYSTEM_FIELDS)
    if text is not None:
        check_text(text, f"{fields.place}: the system text")
    return text if text is None or text.strip() else None


def read_tools(value: Any, place: str) -> list[dict[str, Any]]:
    """Return declared functions in OpenAI's shape, from a list of functions or its JSON text."""
    tools = []
    for tool in _listed(value, place, "tools"):
        function = tool.get("function") if tool.get("type", "function") == "function" and "function" in tool else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{place}: a tool has the fields {names_of(tool)}",
                "make it a function with its name, description and parameters",
            )
        tools.append(tool if function is not tool else {"type": "function", "function": tool})
    return tools


def tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Return tool calls in OpenAI's shape with arguments as an object, from a list (or its JSON text) of calls."""
    calls = []
    for call in _listed(value, place, "tool_calls"):
        outer = dict(call)
        function = outer.pop("function", None)
        if function is None:
            function = {key: outer.pop(key) for key in ("name", "arguments", "parameters") if key in outer}
        if not isinstance(function, dict):
            kind = json_type(function)
            raise UserError(f"{place}: the function of a tool call is a JSON {kind}", "make it an object")
        function = dict(function)
        name, arguments = function.pop("name", None), function.pop("arguments", function.pop("parameters", None))
        kind, identity = outer.pop("type", "function") or "function", outer.pop("id", None)
        outer.pop("index", None)
        left = [key for key, item in (*outer.items(), *function.items()) if not empty(item)]
        if left or kind != "function" or not isinstance(name, str) or not name:
            wrong = f"has the fields {names_of(left)}" if left else f"is of type {kind!r}, named {name!r}"
            raise UserError(f"{place}: a tool call {wrong}", "write it as {name, arguments}, with id and type at most")
        if isinstance(arguments, str) or arguments is None:
            arguments = from_json(arguments or "{}", f"{place}: the arguments of the call of {name}")
        if not isinstance(arguments, dict):
            kind = json_type(arguments)
            raise UserError(f"{place}: the arguments of the call of {name} are a JSON {kind}", "make them an object")
        made = {"type": "function", "function": {"name": name, "arguments": arguments}}
        calls.append(made if identity is None else {"id": identity, **made})
    return calls


def merge_calls(messages: Sequence[Message]) -> Iterator[Message]:
    """Yield the messages with a reply and the function_call turn behind it as one: a text, then the calls."""
    waiting: Message | None = None
    for message in messages:
        both = waiting is not None and message.role == waiting.role == "assistant"
        alike = both and (waiting.trained, waiting.weight) == (message.trained, message.weight)
        if alike and message.tool_calls and not message.content:
            if waiting.thinking is None or message.thinking is None:
                thinking = message.thinking if waiting.thinking is None else waiting.thinking
                waiting = replace(waiting, thinking=thinking, tool_calls=waiting.tool_calls + message.tool_calls)
                continue
        if waiting is not None:
            yield waiting
        waiting = message
    if waiting is not None:
        yield waiting


def _role(fields: Fields) -> tuple[str, str]:
    """Return the role as the row has it, and ours."""
    if not fields.present(ROLE_FIELDS) or not fields.present((*TEXT_FIELDS, "tool_calls", "function_call")):
        has = names_of(fields.left())
        raise UserError(f"{fields.place} has {has}", "give it role and content, or from and value")
    name = fields.take(*ROLE_FIELDS)
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{fields.place} has the role {repr(name)[:40]}", f"give one of {', '.join(ROLES)}")
    return name.strip(), role


def _parts(value: Any, what: str, fields: Fields, role: str) -> tuple[str, list[str], list[dict[str, Any]]]:
    """Return (text, thinking, tool calls) of a content: a string, or a list of parts with a type each."""
    if value is None:
        return "", [], []
    if role == "tool" and not isinstance(value, str) and not _is_parts(value):
        value = json.dumps(value, ensure_ascii=False)  # a result given as JSON itself
    if isinstance(value, str):
        check_text(value, what)
        return value, [], []
    if not _is_parts(value):
        raise UserError(f"{what} is a JSON {json_type(value)}", "make it a string, or a list of text parts")
    texts, thinking, calls = [], [], []
    for part in value:
        inner = Fields(part, what, f"{fields.level}content[].", fields.names, fields.seen)
        kind = inner.take("type")
        if kind in ("text", "input_text", "output_text", None):
            texts.append(check_text(inner.take("text", "value", "content") or "", what))
        elif kind in THINKING_FIELDS:
            thinking.append(check_text(inner.take(*THINKING_FIELDS, "text", "value", "content") or "", what))
        elif kind in ("tool_call", "function_call"):
            calls += _written_calls(check_text(inner.take("value", "text", "content") or "", what), fields.place)[2]
        else:
            raise UserError(
                f"{what} has a part of type {str(kind)[:40]!r}; only text is trained", "leave such rows out"
            )
        inner.finish()
    return "".join(texts), thinking, calls


def _is_parts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and "type" in part for part in value)


def _one_thinking(fields: Fields, parts: list[str], text: str) -> str | None:
    """Return the thinking of a message: of its `parts` or of a field of its own. In its `text` there must be none then.
    """
    own = fields.take(*THINKING_FIELDS)
    if own is not None:
        parts = [*parts, check_text(own, f"{fields.place}: the thinking")]
    if len(parts) > 1 or (parts and text.lstrip().startswith("<think>")):
        raise UserError(f"{fields.place}: has thinking twice", "write it once")
    return parts[0] if parts and parts[0].strip() else None


def _written_calls(text: str, place: str) -> tuple[str, str | None, list[dict[str, Any]]]:
    """Return (text, thinking, calls) of a function_call turn: JSON of one call or several, with <think>...</think>
    before.
    """
    thinking, rest = None, text.strip()
    if rest.startswith("<think>") and "</think>" in rest:
        thinking, _, rest = rest.removeprefix("<think>").partition("</think>")
        thinking = thinking.strip() or None
    value = from_json(rest, f"{place}: the function call")
    return "", thinking, tool_calls(value if isinstance(value, list) else [value], place)


def _listed(value: Any, place: str, what: str) -> list[dict[str, Any]]:
    """Return a list of objects, given as itself or as its JSON text."""
    if isinstance(value, str):
        value = from_json(value, f"{place}: {what}") if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{place}: {what} is a JSON {json_type(value)}", "make it a list of objects")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, TypeError, RecursionError) as error:
        raise UserError(f"{place}: {what} cannot be written as JSON ({type(error).__name__})", "fix the row") from None
    return value


def from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_fields)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON ({error})", "fix the row") from None


def plain(value: Any) -> Any:
    """Return a boolean or number where a text is one, as in a column of a CSV file: false, TRUE, 0.5."""
    if not isinstance(value, str):
        return value
    try:
        read = json.loads(value.strip().lower())
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, (bool, int, float)) else value


def weight_of(fields: Fields) -> float | None:
    """Return what a turn or row itself says its tokens count for in the loss, 0: not trained; None: it says nothing.

    Raises UserError for what is no weight, and for fields that contradict each other.
    """
    said: dict[str, float] = {}
    for names in (_TRAINED_FIELDS, _MASKED_FIELDS):
        found = fields.take_named(*names)
        if found is None:
            continue
        name, value = found[0], plain(found[1])
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise UserError(f"{fields.place}: {name} is {str(value)[:40]!r}", "give true or false")
        said[name] = float(bool(value) is (names is _TRAINED_FIELDS))
    found = fields.take_named(*_WEIGHT_FIELDS)
    if found is not None:
        name, value = found[0], plain(found[1])
        sound = isinstance(value, (bool, int, float)) and (value == 0 or _SMALLEST_WEIGHT <= value <= _LARGEST_WEIGHT)
        if not sound:
            wanted = f"give 0, or a number from {_SMALLEST_WEIGHT:g} to {_LARGEST_WEIGHT:g}"
            raise UserError(f"{fields.place}: {name} is {str(value)[:40]!r}", wanted)
        if all(bool(value) is bool(other) for other in said.values()):
            said = {}
        said[name] = float(value)
    if len(set(said.values())) > 1:
        raise UserError(f"{fields.place}: {' and '.join(said)} contradict each other", "keep one")
    return next(iter(said.values()), None)


def weighted(message: Message, weight: float | None) -> Message:
    """Return a message that counts for `weight` in the loss, whatever the rule of the run; None: by that rule."""
    return message if weight is None else replace(message, trained=weight > 0, weight=weight)


def times(messages: Sequence[Message], weight: float | None) -> list[Message]:
    """Return messages that count `weight` times as much, none of them where it is 0; None: as they are."""
    if weight is None:
        return list(messages)
    return [
        replace(message, trained=message.trained if weight else False, weight=message.weight * weight)
        for message in messages
    ]


def check_text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{what} is a JSON {json_type(text)}", "make it a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} has half of a surrogate pair (as \\ud83d)", "fix its encoding") from None
    return text
