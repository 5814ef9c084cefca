"""Calls of tools in a reply: from the text that a model writes to OpenAI's `tool_calls`, while it comes or at once.

Known are `<tool_call>` blocks of JSON (Hermes, Qwen) or of `<function=...>` (Qwen3-Coder), `<function=...>` alone,
`[TOOL_CALLS]` and `<|python_tag|>` with JSON to the end (Mistral, Llama), DeepSeek's `<｜tool▁calls▁begin｜>`, and
replies that are nothing but JSON of calls (Llama 3). What is no call of a function that the request declares is text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalora.data.turns import tool_calls
from megalora.errors import UserError

# What begins a block of calls -> what ends it; None: the end of the reply.
_BLOCKS: Mapping[str, str | None] = {
    "<tool_call>": "</tool_call>",
    "<function=": "</function>",
    "[TOOL_CALLS]": None,
    "<|python_tag|>": None,
    "<｜tool▁calls▁begin｜>": "<｜tool▁calls▁end｜>",
}
_INSIDE = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
TAGS = (*_BLOCKS, *(end for end in _BLOCKS.values() if end is not None), *_INSIDE)
"""Words of replies that may be special tokens, and must not be left out of the text."""

_DEEPSEEK = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>(?P<named>[^\n]+)\n```json\n(?P<quoted>.*?)\n```|"
    r"(?P<name>[^\n<]+)<｜tool▁sep｜>(?P<plain>.*?))\s*<｜tool▁call▁end｜>",
    re.DOTALL,
)
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
# How JSON of calls begins, without white space.
_JSON = [f'{bracket}{{"{field}"' for bracket in ("", "[") for field in ("name", "type", "function", "id", "arguments")]
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Call:
    """One call. arguments: text of JSON, as OpenAI has it."""

    index: int
    id: str
    name: str
    arguments: str

    def written(self, index: bool = False) -> dict[str, Any]:
        """Return the call in OpenAI's form. index: with its number, as in a stream."""
        call = {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return {"index": self.index, **call} if index else call


class CallReader:
    """Reads one reply while it comes. tools: those that the request declares, in OpenAI's shape; with none all is text.

    White space beside a block of calls belongs to neither. Text that may yet be the beginning of one is held back.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]):
        functions = [tool.get("function", tool) for tool in tools]
        self._parameters = {str(one.get("name")): one.get("parameters") or {} for one in functions}
        self._held, self._opened = "", ""  # opened: what began the block that `_held` is in
        self._space = ""  # before the block that is read
        self._begun = False  # text was given, or calls were
        self.count = 0

    def add(self, text: str) -> list[str | Call]:
        """Return what is known of the reply with this text: texts and calls, in order."""
        if not self._parameters:
            return [text] if text else []
        self._held += text
        return list(self._read(last=False))

    def rest(self) -> list[str | Call]:
        """Return what was held back: the reply has ended."""
        return list(self._read(last=True)) if self._parameters else []

    def _read(self, last: bool) -> Iterator[str | Call]:
        while True:
            if self._opened:
                end = _BLOCKS[self._opened]
                body, found, after = self._held.partition(end) if end is not None else (self._held, "", "")
                if not found and not last:
                    return
                raw = self._opened + body + found
                self._opened, self._held = "", after
                yield from self._block(raw)
                continue
            at, opener = min(((at, o) for o in _BLOCKS if (at := self._held.find(o)) >= 0), default=(-1, ""))
            if opener:
                before, self._held = self._held[:at], self._held[at + len(opener) :]
                yield from self._text(before.rstrip())
                self._space = before[len(before.rstrip()) :]
                self._opened = opener
                continue
            if not self._begun and _may_be_json(self._held):
                if not last:
                    return
                whole, self._held = self._held, ""
                yield from self._block(whole)
            safe = len(self._held) if last else len(self._held) - _overlap(self._held)
            given, self._held = self._held[:safe], self._held[safe:]
            if not last:  # white space may stand before a block
                kept = given[len(given.rstrip()) :]
                given, self._held = given.rstrip(), kept + self._held
            yield from self._text(given)
            return

    def _text(self, text: str) -> Iterator[str]:
        if self.count:
            text = text if text.strip() else ""
        if text:
            self._begun = True
            yield text

    def _block(self, raw: str) -> Iterator[str | Call]:
        """Yield the calls of a block, or its text where it has none."""
        space, self._space = self._space, ""
        try:
            found = [(name, arguments) for name, arguments in _calls(raw, self._parameters)]
        except (ValueError, RecursionError):
            found = []
        if not found or any(name not in self._parameters for name, _ in found):
            yield from self._text(space + raw)
            return
        self._begun = True
        for name, arguments in found:
            written = json.dumps(arguments, ensure_ascii=False)
            yield Call(self.count, "".join(secrets.choice(_LETTERS) for _ in range(9)), name, written)
            self.count += 1


def _calls(raw: str, parameters: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, arguments) of each call of a block. Raises ValueError where it is none."""
    if "<｜tool▁call▁begin｜>" in raw:
        return [
            (match["named"] or match["name"], _object(match["quoted"] or match["plain"] or "{}"))
            for match in _DEEPSEEK.finditer(raw)
        ]
    if "<function=" in raw:
        return [(name, _arguments(body, parameters.get(name) or {})) for name, body in _FUNCTION.findall(raw)]
    for tag in ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"):
        raw = raw.replace(tag, "")
    values: list[Any] = []
    text = raw.strip()
    while text:
        value, end = json.JSONDecoder().raw_decode(text)
        values += value if isinstance(value, list) else [value]
        text = text[end:].lstrip(" \n\t;,")
    try:
        found = tool_calls(values, "the reply")
    except UserError as error:
        raise ValueError(str(error)) from None
    return [(call["function"]["name"], call["function"]["arguments"]) for call in found]


def _arguments(body: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of <function=name>body</function>: JSON, or <parameter=...> by parameter."""
    named = _PARAMETER.findall(body)
    if not named:
        return _object(body.strip() or "{}")
    kinds = schema.get("properties") or {}
    found = {}
    for name, value in named:
        kind = kinds.get(name, {}).get("type") if isinstance(kinds.get(name), Mapping) else None
        found[name] = value if kind in (None, "string") else json.loads(value)
    return found


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _may_be_json(text: str) -> bool:
    """Return whether a reply that begins so may be nothing but JSON of calls."""
    begun = re.sub(r"\s+", "", text[:200])
    return bool(begun) and any(begun.startswith(form) or form.startswith(begun) for form in _JSON)


def _overlap(text: str) -> int:
    """Return the length of the longest end of `text` that begins a block."""
    longest = max(map(len, _BLOCKS))
    ends = range(min(longest - 1, len(text)), 0, -1)
    return next((n for n in ends if any(opener.startswith(text[-n:]) for opener in _BLOCKS)), 0)
