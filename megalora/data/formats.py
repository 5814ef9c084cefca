"""Formats: a row as a file holds it -> a `Conversation`.

A row has one of the shapes in `FORMATS`, told apart by the fields that it has. To add one, write a function that turns
the fields of a row into messages and add its line to the table. Every field of every level is read, refused by name, or
counted as harmless (see fields.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from . import turns
from .conversation import Conversation, Message
from .fields import COLUMNS_FLAG, FieldNames, Fields, json_type, names_of

_RIGHT_ORDER = "[system] user assistant [user assistant ...], with tool results between two assistant messages"


def to_conversation(
    row: Any, where: str, names: FieldNames | None = None, seen: Counter[str] | None = None, *, question: bool = False
) -> Conversation:
    """Return one row as a conversation.

    where     the row's name in an error, such as "data.json row 17"
    names     the user's word on the names of fields
    seen      counts the harmless fields that are there and not read ("field id"), and the columns that were met
    question  the row is asked for a reply: a last reply is left out, and need not be there; a row may be a text alone

    Raises UserError for a row that is malformed or of no known shape, that has a field which is not known, whose roles
    are out of order, or that has an empty text.
    """
    if question and isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict) or not row:
        kind = "an empty object" if row == {} else f"a JSON {json_type(row)}"
        raise UserError(f"{where}: the row is {kind}", "make it an object with fields")
    names = names or FieldNames(flags=not question)
    fields = Fields(row, where, "", names, Counter() if seen is None else seen)
    found = [shape for shape in FORMATS if shape.fits(fields, question)]
    if len(found) != 1:
        known = ", ".join(shape.example for shape in FORMATS if not question or shape.read is not _text)
        known += f", or map other names with {COLUMNS_FLAG}" if names.flags else ""
        fields.refuse_known()
        what = f"no known shape (fields {names_of(fields.left())})"
        if found:
            what = f"two shapes ({' and '.join(shape.example for shape in found)})"
        raise UserError(f"{where}: the row has {what}", f"write one of {known}")
    return found[0].read(fields, question)


def to_question(row: Any, where: str) -> Conversation:
    """Return one row as the conversation that a reply is asked for. Raises UserError as `to_conversation`."""
    return to_conversation(row, where, question=True)


@dataclass(frozen=True)
class Format:
    """A shape of a row: which fields tell it, how it is read, and how it looks in a message."""

    fits: Callable[[Fields, bool], bool]
    read: Callable[[Fields, bool], Conversation]
    example: str


def _text(fields: Fields, question: bool) -> Conversation:
    text = fields.take("text")
    if not isinstance(text, str) or not text.strip():
        what = "is empty" if text is None or isinstance(text, str) else f"is a JSON {json_type(text)}"
        raise UserError(f"{fields.place}: the text {what}", "give a string with something in it")
    turns.check_text(text, f"{fields.place}: the text")
    fields.finish()
    return Conversation((), text=text)


def _exchange(fields: Fields, question: bool) -> Conversation:
    """Return a row that is one exchange, with the earlier ones in `history`."""
    if _has_message_lists(fields):
        return _prompt_and_completion(fields, question)
    head = _Head(fields)
    history = _history(fields.take("history"), fields, head)
    messages = [*history, *turns.read_exchange(fields, reply_needed=not question)]
    return head.finish(messages, question)


def _prompt_and_completion(fields: Fields, question: bool) -> Conversation:
    """Read TRL's conversational rows: prompt and completion are lists of messages."""
    head = _Head(fields)
    messages = []
    for name in ("prompt", "completion", "response"):
        value = fields.take(name)
        if value is not None:
            messages += _message_list(value, name, fields, head, question)
    return head.finish(messages, question)


def _turns(fields: Fields, question: bool) -> Conversation:
    """Return a row with a list of turns."""
    head = _Head(fields)
    name = fields.present(turns.LIST_FIELDS)[0]
    value = fields.take(name)
    messages = _message_list([] if value is None else value, name, fields, head, question)
    return head.finish(messages, question)


def _has_message_lists(fields: Fields) -> bool:
    return isinstance(fields.peek("prompt"), list)


def _is_text(fields: Fields, question: bool) -> bool:
    return not question and bool(fields.present(["text"]))


def _is_exchange(fields: Fields, question: bool) -> bool:
    asked = question and not fields.present((*turns.LIST_FIELDS, "text"))
    wanted = (*turns.REPLY_FIELDS, *turns.QUESTION_FIELDS, "input") if asked else turns.REPLY_FIELDS
    return bool(fields.present(wanted))


def _is_turns(fields: Fields, question: bool) -> bool:
    return bool(fields.present(turns.LIST_FIELDS))


FORMATS = (
    Format(_is_turns, _turns, "{messages: [{role, content}]}, {conversations: [{from, value}]}, {conversation: [...]}"),
    Format(_is_exchange, _exchange, "{instruction, input, output}, {prompt, completion}, {query, response, history}"),
    Format(_is_text, _text, "{text}"),
)


class _Head:
    """What a row says beside its turns: system, tools, variables of the template, and whether it is trained."""

    def __init__(self, fields: Fields):
        self.fields = fields
        self.system = turns.system_text(fields)
        self.tools = turns.read_tools(fields.take(*turns.TOOL_FIELDS), fields.place)
        self.template_kwargs = _template_kwargs(fields)

    def finish(self, messages: list[Message], question: bool) -> Conversation:
        """Return the conversation of `messages`, with every field of the row judged."""
        fields = self.fields
        messages = turns.times(messages, turns.weight_of(fields))
        if self.system is not None and not (messages and messages[0].role == "system"):
            messages = [Message("system", self.system), *messages]
        elif self.system is not None and messages[0].content != self.system:
            raise UserError(f"{fields.place}: two system texts, in the row and in its first message", "keep one")
        fields.finish([message.content for message in messages])
        messages = list(turns.merge_calls(messages))
        if question and messages and messages[-1].role == "assistant":
            messages.pop()
        _check_order(messages, fields.place, question)
        return Conversation(tuple(messages), tuple(self.tools), self.template_kwargs)


def _message_list(value: Any, name: str, fields: Fields, head: _Head, question: bool) -> list[Message]:
    """Return the messages of a list of turns: messages with a role, or exchanges."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # a column of a CSV file
        value = turns.from_json(value, f"{fields.place}: {name}")
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else f"a JSON {json_type(value)}"
        raise UserError(f"{fields.place}: {name} is {what}", "give a list of turns")
    messages: list[Message] = []
    system = None
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            kind = json_type(turn)
            raise UserError(f"{fields.place}: turn {number} of {name} is a JSON {kind}", "make it an object")
        inner = Fields(turn, f"{fields.place}: message {number}", f"{name}[].", fields.names, fields.seen)
        if turns.is_message(inner):
            messages += [turns.read_message(inner, head.tools)]
            continue
        own = turns.system_text(inner)
        if own is not None and own != system:  # some exporters repeat it in each turn
            messages.append(Message("system", own))
            system = own
        last = number == len(value)
        exchange = turns.read_exchange(inner, reply_needed=not (question and last))
        weight = turns.weight_of(inner)
        exchange = turns.times(exchange[:1], weight) + [turns.weighted(reply, weight) for reply in exchange[1:]]
        inner.finish(message.content for message in exchange)
        messages += exchange
    return messages


def _history(value: Any, fields: Fields, head: _Head) -> list[Message]:
    """Return earlier exchanges: [[question, reply], ...], or messages."""
    if value is None:
        return []
    if isinstance(value, str):
        value = turns.from_json(value, f"{fields.place}: history")
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return _message_list(value, "history", fields, head, False)
    if not isinstance(value, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in value
    ):
        raise UserError(
            f"{fields.place}: history is not a list of pairs of strings", "write it as [[question, reply], ...]"
        )
    messages = []
    for question, reply in value:
        for role, text in (("user", question), ("assistant", reply)):
            turns.check_text(text, f"{fields.place}: the history")
            if not text.strip():
                raise UserError(f"{fields.place}: a text of the history is empty", "fill it in or remove the pair")
            messages.append(Message(role, text))
    return messages


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    kwargs = fields.take("chat_template_kwargs", "template_kwargs")
    if isinstance(kwargs, str):
        kwargs = turns.from_json(kwargs, f"{fields.place}: chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise UserError(f"{fields.place}: chat_template_kwargs is a JSON {json_type(kwargs)}", "make it an object")
    kwargs = dict(kwargs or {})
    for reserved in ("messages", "tools", "add_generation_prompt", "tokenize", "chat_template"):
        if reserved in kwargs:
            raise UserError(f"{fields.place}: chat_template_kwargs may not set {reserved}", "leave it out")
    thinking = turns.plain(fields.take("enable_thinking"))
    if thinking is not None:
        if not isinstance(thinking, bool):
            raise UserError(f"{fields.place}: enable_thinking is {str(thinking)[:40]!r}", "give true or false")
        if kwargs.get("enable_thinking", thinking) is not thinking:
            raise UserError(f"{fields.place}: enable_thinking contradicts chat_template_kwargs", "keep one")
        kwargs["enable_thinking"] = thinking
    return kwargs


def _check_order(messages: Sequence[Message], where: str, question: bool) -> None:
    """Raise UserError unless the roles come in an order that can be trained (or asked)."""
    roles = [message.role for message in messages]
    if not question and "assistant" not in roles:
        raise UserError(f"{where}: no assistant turn, so there is nothing to learn", "add the reply")
    allowed = {
        None: {"system", "user"},
        "system": {"system", "user"},
        "user": {"assistant"},
        "assistant": {"user", "system", "tool"},
        "tool": {"tool", "assistant"},
    }
    before = None
    sound = bool(roles) and (roles[-1] in ("user", "tool") if question else roles[-1] == "assistant")
    for role in roles:
        sound = sound and role in allowed[before]
        before = role
    if not sound:
        order = " ".join(roles[:8]) + (" ..." if len(roles) > 8 else "")
        last = " and the last is to be answered" if question else ""
        raise UserError(f"{where}: roles in the wrong order ({order})", f"write a row as {_RIGHT_ORDER}{last}")
