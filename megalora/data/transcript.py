"""Transcript: one conversation as a chat template renders it, and where each reply of the assistant lies in that.

Of a reply there are two forms: as it is generated (what follows the prompt of the messages before it), and as the
template prints it once it is history, which may be without its thinking. Where the two are the same the reply can be
trained in the history; where not, only in a document that it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import UserError
from .conversation import Conversation, Message
from .rendering import Rendered

MARK = "megalora-reply-marker"
_TELLING = 24  # characters of a text that a template does not write by itself
THINK, END_OF_THINKING = "<think>", "</think>"
Render = Callable[[Conversation, bool], Rendered]


@dataclass(frozen=True)
class Span:
    """Where the reply of message `turn` lies in a text, with its end token.

    as_generated  its text there is the one that generation would have to write
    """

    turn: int
    start: int
    stop: int
    as_generated: bool


@dataclass(frozen=True)
class Ending:
    """How a template ends a reply.

    after   all text behind a last reply, such as "<|im_end|>\\n"
    end     up to its first special token, that included
    end_token  that token
    tokens  the special tokens, each of which may end a reply
    lead    white space between a prompt and the reply, which generation has to write (Llama 2's space)
    """

    after: str
    end: str
    end_token: str
    tokens: tuple[str, ...]
    lead: str = ""

    def cut(self, reply: str) -> str | None:
        """Return a last reply up to the token that ends it, or None where there is none."""
        if reply.endswith(self.after):
            return reply[: len(reply) - len(self.after)] + self.end
        stop = max((at + len(token) for token in self.tokens if (at := reply.rfind(token)) >= 0), default=0)
        return reply[:stop] if stop and not reply[stop:].strip() else None


class Transcript:
    """The texts of one conversation. Each is rendered once.

    render         renders a conversation, with the start of a reply behind it or not
    ending         of the template's replies
    marks_replies  the template says itself, with {% generation %}, which text is the assistant's
    blame          makes the error that says what the template does wrong
    marked         the special tokens in the messages are marked
    made_ids       the calls of tools have ids that were made for the template
    """

    def __init__(
        self,
        conversation: Conversation,
        render: Render,
        ending: Ending,
        marks_replies: bool,
        blame: Callable[[str], UserError],
        *,
        marked: bool = False,
        made_ids: bool = False,
    ):
        self._conversation, self._messages = conversation, conversation.messages
        self._render, self._ending, self._marks_replies = render, ending, marks_replies
        self._blame, self.marked, self.made_ids = blame, marked, made_ids
        self._prompts: dict[int, Rendered] = {}
        self._wholes: dict[int, Rendered] = {}
        self._replies: dict[int, str] = {}

    @property
    def last_turn(self) -> int:
        """The last reply; where the last message is none, the reply that comes next."""
        last = len(self._messages)
        return last - 1 if self._messages and self._messages[-1].role == "assistant" else last

    def prompt(self, turn: int) -> str:
        """Return what generation starts from to write message `turn`."""
        return self._prompt(turn).text

    def prints_system(self, turn: int) -> bool:
        """Return whether the prompt of the last reply has the system text of message `turn`; an empty one it has.

        A short text, or one that another message holds too, may stand there without it: a marker in its place tells.
        """
        messages, stop = self._messages, self.last_turn
        content = messages[turn].content.strip()
        if not content or content not in self.prompt(stop):
            return not content
        if len(content) >= _TELLING and sum(content in message.content for message in messages) == 1:
            return True
        marked = (*messages[:turn], replace(messages[turn], content=MARK), *messages[turn + 1 :])
        return MARK in self._render(self._conversation.with_messages(marked[:stop]), True).text

    def reply(self, turn: int) -> str:
        """Return message `turn` as generation writes it behind `prompt(turn)`, with its end token."""
        if turn not in self._replies:
            self._replies[turn] = self._as_generated(turn)
        return self._replies[turn]

    def document(self, turn: int) -> tuple[str, list[Span]]:
        """Return the text that ends with the reply of message `turn`, and the replies in it, in order."""
        if self._marks_replies:
            whole = self._whole(turn)
            spans = self._marked(whole, turn + 1)
            check_thinking(self._messages[turn])
            if not _keeps(whole.text[spans[-1].start : spans[-1].stop], self._messages[turn]):
                raise self._blame(f"drops a part of message {turn + 1}")
            return whole.text, spans
        prompt, reply = self.prompt(turn), self.reply(turn)
        return prompt + reply, [*self.history(turn), Span(turn, len(prompt), len(prompt) + len(reply), True)]

    def history(self, turn: int) -> list[Span]:
        """Return the replies in `prompt(turn)`, in order, but for those that cannot be told from the text around."""
        if self._marks_replies:
            return self._marked(self._prompt(turn), turn)
        spans: list[Span] = []
        for earlier in self._turns(turn):
            span = self._find(earlier, turn)
            if span is not None and span.start >= (spans[-1].stop if spans else 0):
                spans.append(span)
        return spans

    def kept(self, turn: int) -> tuple[str, list[Span]]:
        """Return `document(turn)` with every earlier reply as it was generated: its thinking stays in the history."""
        text, spans, done = "", [], 0
        prompt = self.prompt(turn)
        found = {span.turn: span for span in self.history(turn)}
        for earlier in self._turns(turn):
            span, reply = found.get(earlier), self.reply(earlier)
            if span is None:
                raise self._blame(f"renders message {earlier + 1} so that its reply cannot be found in the text")
            opening = self.prompt(earlier)
            same = opening.startswith(prompt[: span.start])  # it may go on with a <think> that the history has not
            text += prompt[done : span.start] + (opening[span.start :] if same else "")
            spans.append(Span(earlier, len(text), len(text) + len(reply), True))
            text, done = text + reply, span.stop
        text += prompt[done:]
        reply = self.reply(turn)
        return text + reply, [*spans, Span(turn, len(text), len(text) + len(reply), True)]

    # Rendering

    def _turns(self, stop: int) -> list[int]:
        return [turn for turn in range(stop) if self._messages[turn].role == "assistant"]

    def _part(self, stop: int) -> Conversation:
        return self._conversation.with_messages(self._messages[:stop])

    def _prompt(self, turn: int) -> Rendered:
        if turn not in self._prompts:
            self._prompts[turn] = self._render(self._part(turn), True)
        return self._prompts[turn]

    def _whole(self, turn: int) -> Rendered:
        if turn not in self._wholes:
            self._wholes[turn] = self._render(self._part(turn + 1), False)
        return self._wholes[turn]

    # Finding replies

    def _marked(self, rendered: Rendered, stop: int) -> list[Span]:
        """Return the {% generation %} blocks as spans: the replies in order, one block each."""
        turns = self._turns(stop)
        if len(rendered.generated) != len(turns):
            blocks = len(rendered.generated)
            raise self._blame(f"has {blocks} generation blocks for {len(turns)} messages of the assistant")
        spans = []
        for turn, (start, end) in zip(turns, rendered.generated, strict=True):
            last = self._whole(turn)
            alone = last.text[slice(*last.generated[-1])] if last.generated else None
            spans.append(Span(turn, start, end, turn == stop - 1 or rendered.text[start:end] == alone))
        return spans

    def _find(self, earlier: int, turn: int) -> Span | None:
        """Return the reply of message `earlier` in the prompt of message `turn`."""
        text, prompt, reply = self.prompt(turn), self.prompt(earlier), self.reply(earlier)
        if text.startswith(prompt) and text.startswith(reply, len(prompt)):
            return Span(earlier, len(prompt), len(prompt) + len(reply), True)
        place = self._place(text, earlier, turn, True)
        if place is None:
            return None
        start, stop = place
        end = self._ending.end
        stop += len(end) if text.startswith(end, stop) else 0
        if text.startswith(prompt) and len(prompt) < start:
            start = len(prompt)  # what goes before a reply (Llama 2's space) generation has to write
        elif text.endswith(reply, 0, stop) and stop - len(reply) <= start:
            start = stop - len(reply)  # the same where the history differs otherwise (Mistral's system message)
        return Span(earlier, start, stop, text[start:stop] == reply)

    def _place(self, text: str, turn: int, stop: int, add_generation_prompt: bool) -> tuple[int, int] | None:
        """Return where the content of message `turn` lies in `text`, which the messages before `stop` are rendered to.

        It is found by rendering them once more with a marker in its place.
        """
        mark = MARK
        while mark in text:
            mark += "+"
        other = replace(self._messages[turn], content=mark, thinking=None)
        messages = (*self._messages[:turn], other, *self._messages[turn + 1 : stop])
        try:
            marked = self._render(replace(self._conversation, messages=messages), add_generation_prompt).text
        except UserError:
            return None
        before, found, after = marked.partition(mark)
        start, end = len(before), len(text) - len(after)
        if not found or start > end or not (text.startswith(before) and text.endswith(after)):
            return None
        return start, end

    # What generation writes

    def _as_generated(self, turn: int) -> str:
        message, prompt = self._messages[turn], self.prompt(turn)
        check_thinking(message)
        whole = self._whole(turn).text
        reply = self._ending.cut(whole[len(prompt) :]) if whole.startswith(prompt) else None
        if reply is not None and _keeps(reply, message):
            return reply
        opened = prompt.rstrip().endswith(THINK)  # generation starts inside the thinking, so training does too
        if message.tool_calls:
            return self._calls(turn, opened)
        content = message.with_thinking_in_content().content
        thinks = content.lstrip().startswith(THINK)
        if thinks and prompt.rstrip().endswith(END_OF_THINKING):
            raise UserError(
                f"message {turn + 1} has thinking, but its prompt ends with {END_OF_THINKING}: thinking is off",
                "switch it on with enable_thinking, or remove the thinking",
            )
        if opened:
            return _inside(content, turn) + self._ending.end
        place = self._place(whole, turn, turn + 1, False)
        printed = content if place is None else whole[slice(*place)]
        return self._ending.lead + (printed if _keeps(printed, message) else content) + self._ending.end

    def _calls(self, turn: int, opened: bool) -> str:
        """Return a message that calls tools, where the template does not print it whole behind its prompt."""
        message, whole, base = self._messages[turn], self._whole(turn).text, self.prompt(turn)
        if not opened and not whole.startswith(base):  # a system text that moves with the last question (Mistral)
            whole = self._render(_without_system(self._part(turn + 1)), False).text
            base = self._render(_without_system(self._part(turn)), True).text
        if opened:
            base = base.rstrip().removesuffix(THINK)
        reply = self._ending.cut(whole[len(base) :]) if whole.startswith(base) else None
        if reply is None:
            calls = f"the tool calls of message {turn + 1}"
            raise self._blame(f"does not print {calls} behind their prompt, with an end token")
        if not _keeps(reply, message):
            if not opened or not _keeps(reply, replace(message, thinking=None)):
                lost = "text" if message.content.strip() else "thinking"
                raise self._blame(f"drops the {lost} of message {turn + 1}, which calls tools")
            reply = replace(message, content="").with_thinking_in_content().content + reply
        return _inside(reply, turn) if opened else reply


def _inside(reply: str, turn: int) -> str:
    """Return a reply behind a prompt that opens the thinking; where it has none the empty one is closed, as Qwen3 does.
    """
    if reply.lstrip().startswith(THINK):
        return reply.lstrip().removeprefix(THINK).removeprefix("\n")
    if THINK in reply.partition(END_OF_THINKING)[0]:
        raise UserError(f"message {turn + 1} has text before its {THINK}, which its prompt opens", "take it out")
    return reply if END_OF_THINKING in reply else f"\n{END_OF_THINKING}\n\n{reply}"


def _without_system(conversation: Conversation) -> Conversation:
    messages = tuple(message for message in conversation.messages if message.role != "system")
    return replace(conversation, messages=messages)


def check_thinking(message: Message) -> None:
    """Raise UserError for thinking that has no end, or ends before it ends."""
    content = message.content.lstrip()
    if content.startswith(THINK) and END_OF_THINKING not in content:
        raise UserError(f"a reply opens {THINK} and does not close it", f"add {END_OF_THINKING}, or remove the row")
    if message.thinking is not None and END_OF_THINKING in message.thinking:
        raise UserError(f"the thinking of a reply contains {END_OF_THINKING}, which would end it", "remove the tag")


def _keeps(reply: str, message: Message) -> bool:
    """Return whether a reply has all of a message with thinking or tool calls, but white space and <think>."""
    if message.thinking is None and END_OF_THINKING not in message.content and not message.tool_calls:
        return True
    return _squashed(message.with_thinking_in_content().content) in _squashed(reply)


def _squashed(text: str) -> str:
    return "".join(text.replace(THINK, "").replace(END_OF_THINKING, "").split())
