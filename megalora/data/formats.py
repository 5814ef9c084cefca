"""Rows: what a data file holds, read and brought to one shape, a list of `{"role", "content"}` messages.

A file is a JSON list of rows, one row, JSON Lines, or rows one after another with white space between; UTF-8,
with or without a byte order mark. A row has one of the shapes in `FORMATS`, told apart by the field that
names it. To add one, write a function that turns a row into (role, text) turns and add its line to the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError

Message = dict[str, str]
Turns = Iterator[tuple[str, Any]]


def read_rows(path: str | Path) -> list[Any]:
    """The raw rows of the file at `path`, as JSON gives them (an object each, where the file is sound).

    Raises UserError (file, line, column) where the file is missing, empty, not UTF-8 or not JSON.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read the data file {path}: {reason}; check the path") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"{path} line {data.count(10, 0, error.start) + 1}"  # 10 is the newline
        raise UserError(f"{place}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    try:
        values = list(_values(text))
    except json.JSONDecodeError as error:
        place = f"{path} line {error.lineno} column {error.colno}"
        raise UserError(f"{place}: bad JSON: {error.msg}; mend the file there") from None
    except (RecursionError, ValueError) as error:  # nested too deep, a number of thousands of digits
        raise UserError(f"{path}: JSON that cannot be read: {error}; mend the file") from None
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    if not rows:
        raise UserError(f"{path} holds no rows; a row is one of {_known_shapes()}")
    return rows


def _values(text: str) -> Iterator[Any]:
    """The JSON values of `text` in order, with nothing but white space between them."""
    decoder, at = json.JSONDecoder(), 0
    while True:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        if at == len(text):
            return
        value, at = decoder.raw_decode(text, at)
        yield value


def to_messages(row: Any, where: str) -> list[Message]:
    """One row as messages: a system message or none, then user and assistant in turn, the assistant last.

    Raises UserError naming `where` (such as "data.json row 17") for a row that is empty, malformed or of no
    known shape, whose roles are out of order, or that has an empty text.
    """
    if not isinstance(row, dict) or not row:
        kind = "an empty object" if row == {} else f"a JSON {_json_type(row)}"
        raise UserError(f"{where}: a row must be an object with fields, this is {kind}")
    _refuse(row, where)
    found = [key for key in FORMATS if key in row]
    if len(found) != 1:
        what = f"two shapes ({' and '.join(found)})" if found else f"no known shape (fields {_names(row)})"
        raise UserError(f"{where}: the row has {what}; known shapes: {_known_shapes()}")
    turns = list(FORMATS[found[0]].turns(row, where))
    if row.get("system") and not (turns and turns[0] == ("system", row["system"])):
        turns.insert(0, ("system", row["system"]))
    return _check(turns, where)


def to_question(row: Any, where: str) -> list[Message]:
    """One row as the messages that a reply is asked for: those of `to_messages` without the last reply, which need not
    be there; or {prompt: text}, or a text alone. Raises UserError as `to_messages`."""
    if isinstance(row, str):
        row = {"prompt": row}
    if isinstance(row, dict) and "prompt" in row and not any(key in row for key in FORMATS):
        row = {"instruction": row["prompt"], **{key: value for key, value in row.items() if key == "system"}}
    return to_messages(_replied(row), where)[:-1]


def _replied(row: Any) -> Any:
    """The row with something for a reply where it ends without one."""
    if not isinstance(row, dict):
        return row
    for field in ("messages", "conversations", "conversation"):
        turns = row.get(field)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            last = turns[-1]
            role, text = ("role", "content") if field == "messages" else ("from", "value")
            if field == "conversation":
                return row if last.get("output") else {**row, field: [*turns[:-1], {**last, "output": _REPLY}]}
            asks = _ROLES.get(last.get(role)) == "user"
            return {**row, field: [*turns, {role: "assistant", text: _REPLY}]} if asks else row
    if not row.get("output") and ("instruction" in row or "input" in row):
        return {**row, "output": _REPLY}
    return row


_REPLY = "..."


def _check(turns: list[tuple[str, Any]], where: str) -> list[Message]:
    """Texts are texts, none is empty, and the roles come in order."""
    for number, (role, text) in enumerate(turns, 1):
        which = f"{where}: the {role} text of message {number}"
        if not isinstance(text, str):
            raise UserError(f"{which} is a JSON {_json_type(text)}; it must be a string")
        if not text.strip():
            raise UserError(f"{which} is empty; fill it in or remove the row")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{which} has half of a surrogate pair (as \\ud83d); mend it") from None
    if "assistant" not in [role for role, _ in turns]:
        raise UserError(f"{where}: no assistant turn, so there is nothing to learn; add the reply")
    spoken = turns[1:] if turns[0][0] == "system" else turns
    expected = [("user", "assistant")[i % 2] for i in range(len(spoken))]
    roles = [role for role, _ in spoken]
    if roles != expected or roles[-1] != "assistant":
        order = " ".join(role for role, _ in turns[:8]) + (" ..." if len(turns) > 8 else "")
        right = "[system] user assistant [user assistant ...]"
        raise UserError(f"{where}: roles in the wrong order ({order}); a row is {right}")
    return [{"role": role, "content": text} for role, text in turns]


def _alpaca(row: dict, where: str) -> Turns:
    if row.get("history"):
        shape = FORMATS["conversation"].example
        raise UserError(f"{where}: field history is not read; write the turns as {shape}")
    return _conversation_turn(row, where)


def _conversation(row: dict, where: str) -> Turns:
    system = None
    for turn in _objects(row["conversation"], "conversation", where):
        if turn.get("system") and turn["system"] == system:  # repeated in each turn, as some exporters do
            turn = {**turn, "system": None}
        system = turn.get("system") or system
        if turn.get("system"):
            yield "system", turn["system"]
        yield from _conversation_turn({**turn, "system": None}, where)


def _conversation_turn(turn: dict, where: str) -> Turns:
    """{instruction?, input?, output}: the user's text is the instruction, and the input on the next line."""
    parts = [turn.get("instruction"), turn.get("input")]
    for part in parts:
        if part is not None and not isinstance(part, str):
            kind = _json_type(part)
            raise UserError(f"{where}: instruction and input must be strings, one is a JSON {kind}")
    yield "user", "\n".join(part for part in parts if part)
    if "output" not in turn:
        raise UserError(f"{where}: a turn has no output (its fields: {_names(turn)}); add the reply")
    yield "assistant", turn["output"]


def _messages(row: dict, where: str) -> Turns:
    return _roles(row, "messages", "role", "content", where)


def _conversations(row: dict, where: str) -> Turns:
    return _roles(row, "conversations", "from", "value", where)


_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def _roles(row: dict, field: str, role_key: str, text_key: str, where: str) -> Turns:
    for number, message in enumerate(_objects(row[field], field, where), 1):
        if role_key not in message or text_key not in message:
            has = _names(message)
            raise UserError(f"{where}: message {number} needs {role_key} and {text_key}, it has {has}")
        name = message[role_key]
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            known = ", ".join(_ROLES)
            raise UserError(f"{where}: message {number} has the role {name!r}; known roles: {known}")
        _refuse(message, f"{where}: message {number}")
        yield role, message[text_key]


# What would change what is learned, and is not read -> what to do instead.
_NOT_READ = {
    "tools": "write them into the system message",
    "tool_calls": "write the call into the content, as the model is to say it",
    "reasoning_content": "write it into the content, as <think>...</think> before the answer",
    "weight": "leave out what is not to be learned",
    "system_prompt": "name it system",
}


def _refuse(fields: dict, where: str) -> None:
    for name, remedy in _NOT_READ.items():
        if fields.get(name) not in (None, "", [], {}, 1):
            raise UserError(f"{where}: field {name} is not read; {remedy}")


def _objects(value: Any, field: str, where: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else f"a JSON {_json_type(value)}"
        raise UserError(f"{where}: {field} must be a list of turns, this is {what}")
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            kind = _json_type(item)
            raise UserError(f"{where}: turn {number} of {field} must be an object, this is a JSON {kind}")
    return value


class Format(NamedTuple):
    """A row shape: how to read it, and how it looks (for error messages)."""

    turns: Callable[[dict, str], Turns]
    example: str


# The field that tells the shape -> the shape.
FORMATS = {
    "output": Format(_alpaca, "{instruction, input, output}"),
    "conversation": Format(_conversation, "{conversation: [{system?, instruction?, input, output}]}"),
    "messages": Format(_messages, "{messages: [{role, content}]}"),
    "conversations": Format(_conversations, "{conversations: [{from, value}]}"),
}


def _known_shapes() -> str:
    return ", ".join(shape.example for shape in FORMATS.values())


def _names(row: dict) -> str:
    names = ", ".join(list(row)[:8]) or "none"
    return names if len(names) <= 120 else names[:120] + "..."


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
