"""Conversation: what a row says, in one shape, before any tokenizer or template sees it.

Readers and formats make conversations; chat templates and generation read them. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..errors import UserError

Role = Literal["system", "user", "assistant", "tool"]
TrainOn = Literal["all", "last", "prompt"]
MessageDict = dict[str, Any]  # as tokenizer.apply_chat_template takes it


@dataclass(frozen=True)
class Message:
    """One message.

    content     the text; empty only where the message has thinking or tool_calls, or is a system message left empty
    thinking    the reasoning before the content, where the row has a field of its own for it. Thinking that a row
                writes into the content, as <think>...</think>, stays there
    tool_calls  in OpenAI's shape: {"type": "function", "function": {"name", "arguments": object}, "id"?}
    trained     whether the loss reads this message; None: by the rule of the run (`Conversation.resolve`). The text
                between two replies is trained where all of its system and user messages are and none is a tool's
    weight      what a token of the message counts for in the loss where it is trained; 0 is the same as trained=False
    extra       fields that a template may read beside these (name, tool_call_id)
    """

    role: Role
    content: str
    thinking: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    trained: bool | None = None
    weight: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> MessageDict:
        """Return the message as `tokenizer.apply_chat_template` takes it.

        Thinking is `reasoning_content`; the content of a message that is all tool calls is None, as OpenAI has it.
        """
        content = None if self.tool_calls and not self.content else self.content
        message: MessageDict = {"role": self.role, "content": content}
        if self.thinking is not None:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [dict(call) for call in self.tool_calls]
        return {**message, **self.extra}

    def with_trained(self, trained: bool) -> Message:
        """Return the message with `trained` set (quicker than dataclasses.replace)."""
        if trained is self.trained:
            return self
        return Message(self.role, self.content, self.thinking, self.tool_calls, trained, self.weight, self.extra)

    def with_thinking_in_content(self) -> Message:
        """Return the message with its thinking written into the content, for templates that read only that."""
        if self.thinking is None:
            return self
        return replace(self, content=f"<think>\n{self.thinking}\n</think>\n\n{self.content}", thinking=None)


@dataclass(frozen=True)
class Conversation:
    """The messages of a row, in order, the last one the assistant's; or a plain text.

    tools            functions that the assistant may call, in OpenAI's shape: {"type": "function", "function": {...}}
    template_kwargs  variables of the chat template for this row, such as enable_thinking
    text             a text without turns (`messages` is empty), with no template: every token is trained
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None

    @classmethod
    def from_dicts(cls, messages: Sequence[Mapping[str, Any]], **more: Any) -> Conversation:
        """Build a conversation of messages as `tokenizer.apply_chat_template` takes them. more: of its other fields."""
        named = ("role", "content", "reasoning_content", "tool_calls")
        made = [
            Message(
                message["role"],
                message.get("content") or "",
                message.get("reasoning_content"),
                tuple(message.get("tool_calls") or ()),
                extra={name: value for name, value in message.items() if name not in named},
            )
            for message in messages
        ]
        return cls(tuple(made), **more)

    def to_dicts(self) -> list[MessageDict]:
        """Return the messages as `tokenizer.apply_chat_template` takes them."""
        return [message.to_dict() for message in self.messages]

    def template_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `tokenizer.apply_chat_template` that this row asks for."""
        tools = {"tools": [dict(tool) for tool in self.tools]} if self.tools else {}
        return {**tools, **self.template_kwargs}

    def resolve(self, train_on: TrainOn) -> Conversation:
        """Return the conversation with `trained` set for every message.

        A message that says so itself keeps what it says. Else "all" trains the assistant's messages, "last" the last
        of them, "prompt" also the system's and the user's. A tool's result is never trained. Raises UserError where a
        message before a reply says that it is trained, and another before the same reply counts for less.
        """
        last = max((i for i, message in enumerate(self.messages) if message.role == "assistant"), default=-1)
        roles = {"all": {"assistant"}, "last": {"assistant"}, "prompt": {"assistant", "system", "user"}}[train_on]

        def trained(index: int, message: Message) -> bool:
            if message.role == "tool" or message.weight == 0:
                return False
            if message.trained is not None:
                return message.trained
            return message.role in roles and (train_on != "last" or index == last)

        messages = tuple(message.with_trained(trained(i, message)) for i, message in enumerate(self.messages))
        if any(message.trained and message.role != "assistant" for message in self.messages):
            _check_prompts(self.messages, messages)
        return self.with_messages(messages)

    def with_messages(self, messages: tuple[Message, ...]) -> Conversation:
        """Return the conversation with other messages (quicker than dataclasses.replace)."""
        return Conversation(messages, self.tools, self.template_kwargs, self.text)


def _check_prompts(said: Sequence[Message], resolved: Sequence[Message]) -> None:
    """Raise UserError where a message says that it is trained, but the text before its reply counts for less."""
    first = 0
    for stop, message in enumerate(resolved):
        if message.role != "assistant":
            continue
        counts = [asked.weight if asked.trained else 0.0 for asked in resolved[first:stop]]
        if any(one.trained and count > min(counts) for one, count in zip(said[first:stop], counts, strict=True)):
            told = ", ".join(f"{one.role} {count:g}" for one, count in zip(resolved[first:stop], counts, strict=True))
            raise UserError(
                f"the text before a reply is trained as a whole, but its messages count for different weights ({told})",
                "give all of them the same train or weight",
            )
        first = stop + 1
