"""Tools in a conversation: the forms in which templates take calls, and the words that show them printed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from .conversation import Conversation, Message


@dataclass(frozen=True)
class CallForm:
    """How a template takes a message that calls tools.

    text_arguments  the arguments as a text of JSON, as OpenAI sends them, not as an object
    empty_content   what stands for no content: "absent", "none" (null) or "text" (an empty one)
    """

    text_arguments: bool = False
    empty_content: str = "absent"

    def written(self, message: Message) -> dict[str, Any]:
        """Return a message as templates take it; fields that are null are left out, as transformers leaves them out."""
        written = {name: value for name, value in message.to_dict().items() if value is not None}
        if message.tool_calls:
            if self.text_arguments:
                written["tool_calls"] = [_with_text_arguments(call) for call in message.tool_calls]
            if "content" not in written and self.empty_content != "absent":
                written["content"] = None if self.empty_content == "none" else ""
        return written


CALL_FORMS = tuple(CallForm(text, empty) for empty in ("absent", "none", "text") for text in (False, True))


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
