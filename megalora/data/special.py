"""Special tokens in the text of messages: text by default, so that a message cannot forge a turn.

Before a template renders a conversation, each special token that a message writes is put between two marks; behind it,
what lies between marks is tokenised as text. The template's own special tokens have no marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import UserError
from .conversation import Conversation, Message

_START, _END = "\ufdd0", "\ufdd1"  # Unicode's noncharacters: of no text that is meant to be exchanged
_MARKED = re.compile(f"{_START}([^{_START}{_END}]*){_END}|[{_START}{_END}]")
THINKING_TAGS = ("<think>", "</think>")


class SpecialTokens:
    """The tokens that structure a conversation.

    tokens  the special tokens of the tokenizer, and what the template writes around turns
    """

    def __init__(self, tokens: Iterable[str]):
        longest_first = sorted({token for token in tokens if token}, key=lambda token: (-len(token), token))
        self._tokens = frozenset(longest_first)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def mark(self, conversation: Conversation) -> Conversation:
        """Return the conversation with its special tokens marked; the same object where it has none.

        The tags of thinking are left as they are in the assistant's messages. Raises UserError for a text with marks.
        """
        messages = tuple(self._mark_message(message) for message in conversation.messages)
        tools = self._mark(conversation.tools)
        variables = self._mark(conversation.template_kwargs)
        if tools is conversation.tools and variables is conversation.template_kwargs:
            if all(new is old for new, old in zip(messages, conversation.messages, strict=True)):
                return conversation
        _refuse_marks(_texts(conversation))
        return replace(conversation, messages=messages, tools=tools, template_kwargs=variables)

    def count(self, conversation: Conversation) -> int:
        """Return how many special tokens `mark` marks."""
        marked = self.mark(conversation)
        return 0 if marked is conversation else _count(_texts(marked), _START)

    def mark_text(self, text: str) -> str:
        """Return a text with its special tokens marked; the same object where it has none."""
        marked = self._mark(text)
        if marked is not text:
            _refuse_marks(text)
        return marked

    def _mark_message(self, message: Message) -> Message:
        keep = THINKING_TAGS if message.role == "assistant" else ()
        fields = {name: getattr(message, name) for name in ("content", "thinking", "tool_calls", "extra")}
        new = {name: self._mark(value, keep) for name, value in fields.items()}
        return message if all(new[name] is fields[name] for name in fields) else replace(message, **new)

    def _mark(self, value: Any, keep: tuple[str, ...] = ()) -> Any:
        """Return the value with every special token in its texts marked; the same object where there is none."""
        if not value:
            return value
        if isinstance(value, str):
            if not self._any.search(value):
                return value
            return self._any.sub(lambda at: at[0] if at[0] in keep else f"{_START}{at[0]}{_END}", value)
        if isinstance(value, Mapping):
            new = {self._mark(key, keep): self._mark(item, keep) for key, item in value.items()}
            same = all(
                a is b
                for pair, item in zip(new.items(), value.items(), strict=True)
                for a, b in zip(pair, item, strict=True)
            )
            return value if same else new
        if isinstance(value, (list, tuple)):
            items = [self._mark(item, keep) for item in value]
            return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
        return value

    def cut(self, text: str) -> list[tuple[str, bool]]:
        """Cut a rendered text of marked messages: (piece, whether it is a special token that is text).

        Raises UserError where the template has written a mark in another form.
        """
        if "\\ufdd0" in text:
            raise UserError("the template escapes special tokens of the text", "write them otherwise")
        pieces, done = [], 0
        for found in _MARKED.finditer(text):
            whole = found[1] in self._tokens
            pieces += [(text[done : found.start()], False), (found[1] or "", whole)]
            done = found.end()
        return [(piece, verbatim) for piece, verbatim in [*pieces, (text[done:], False)] if piece]


def _texts(conversation: Conversation) -> list[Any]:
    """Return all that a conversation says."""
    fields = [
        [message.content, message.thinking, message.tool_calls, message.extra] for message in conversation.messages
    ]
    return [fields, conversation.tools, conversation.template_kwargs]


def _refuse_marks(value: Any) -> None:
    if _count(value, _START) or _count(value, _END):
        raise UserError("the row has a special token in a text and U+FDD0 or U+FDD1, which mark one", "remove them")


def _count(value: Any, mark: str) -> int:
    """Return how often a mark is in the texts of a value."""
    if isinstance(value, str):
        return value.count(mark)
    if isinstance(value, Mapping):
        return sum(_count(key, mark) + _count(item, mark) for key, item in value.items())
    return sum(_count(item, mark) for item in value) if isinstance(value, (list, tuple)) else 0
