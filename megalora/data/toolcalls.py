"""Tools in a conversation: the forms in which templates take calls, and the words that show them printed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .conversation import Conversation, Message


@dataclass(frozen=True)
class CallForm:
    """How a template takes a message that calls tools.

    text_arguments  the arguments as a text of JSON, as OpenAI sends them, not as an object
    empty_content   what stands for no content: "absent", "none" (null) or "text" (an empty one)
    short_ids       calls and results have ids of nine letters and digits (Mistral), see `with_short_ids`
    """

    text_arguments: bool = False
    empty_content: str = "absent"
    short_ids: bool = False

    def written(self, message: Message) -> dict[str, Any]:
        """Return a message as templates take it; fields that are null are left out, as transformers leaves them out."""
        written = {name: value for name, value in message.to_dict().items() if value is not None}
        if message.tool_calls:
            if self.text_arguments:
                written["tool_calls"] = [_with_text_arguments(call) for call in message.tool_calls]
            if "content" not in written and self.empty_content != "absent":
                written["content"] = None if self.empty_content == "none" else ""
        return written


CALL_FORMS = tuple(
    CallForm(text, empty, short)
    for short in (False, True)
    for empty in ("absent", "none", "text")
    for text in (False, True)
)


def with_short_ids(conversation: Conversation) -> Conversation:
    """Return the conversation with ids of nine letters and digits for its calls, and for the results of each.

    An id that has this form stays; another one, or none, becomes a hash of the call and its place. A result without
    the id of a call belongs to the first call that has none yet.
    """
    known: dict[str, str] = {}
    waiting: list[str] = []
    messages: list[Message] = []
    for message in conversation.messages:
        if message.tool_calls:
            place = f"{len(messages)} "
            calls = [(call, _short_id(call, f"{place}{number}")) for number, call in enumerate(message.tool_calls)]
            known |= {str(call["id"]): short for call, short in calls if "id" in call}
            waiting = [short for _, short in calls]
            message = replace(message, tool_calls=tuple({**call, "id": short} for call, short in calls))
        elif message.role == "tool":
            short = known.get(str(message.extra.get("tool_call_id")), waiting[0] if waiting else None)
            waiting = [other for other in waiting if other != short]
            if short is not None:
                message = replace(message, extra={**message.extra, "tool_call_id": short})
        messages.append(message)
    return replace(conversation, messages=tuple(messages))


def _short_id(call: Mapping[str, Any], place: str) -> str:
    if re.fullmatch("[A-Za-z0-9]{9}", str(call.get("id", ""))):
        return str(call["id"])
    digest = hashlib.sha256((place + json.dumps(call, sort_keys=True)).encode()).digest()
    return base64.b32encode(digest)[:9].decode()


def call_names(conversation: Conversation) -> list[str]:
    """Return the names of the functions that the messages call."""
    calls = [call for message in conversation.messages for call in message.tool_calls]
    return [str(call.get("function", call).get("name", "")) for call in calls]


def tool_names(conversation: Conversation) -> list[str]:
    """Return the names of the tools."""
    return [str(tool.get("function", tool).get("name", "")) for tool in conversation.tools]


def longest_word(text: str) -> str:
    """Return the longest run of letters and digits of a text, which stays itself however a template quotes it."""
    return max(re.findall(r"[^\W_]+", text) or [""], key=len)


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function", {}))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": function}
