"""Chat template: conversations -> tokens and labels, the same for training and for generation.

A document is the prompt exactly as generation gets it, then the last reply and its end token:

    <|im_start|>user\\nWho are you?<|im_end|>\\n<|im_start|>assistant\\n  I am Mega.<|im_end|>
    |------------------------ prompt: -100 ---------------------------|------ labels ------|

Replies in the history are labelled too, where the template prints them there as they are generated. One that it prints
otherwise (most thinking models drop the thinking of earlier turns) is trained as `history_thinking` says: in a document
that it ends ("split"), not at all ("mask"), or in a history that keeps the thinking ("keep").

Text is cut at every boundary of a reply and each piece is tokenised by itself, so that no token straddles a
boundary: labels are exact, and the prompt's tokens do not depend on what follows. `prompt` cuts the same way.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..added_tokens import entries_of
from ..errors import UserError
from .conversation import Conversation, Message
from .pieces import IGNORE, PieceTokenizer, Sample, Segment
from .rendering import Rendered, Renderer, size_of, told
from .special import THINKING_TAGS, SpecialTokens
from .template_choice import OPTIONS, choose, with_defaults, with_fixed_date
from .tokenizer import OpenedTokenizer, open_tokenizer
from .toolcalls import CALL_FORMS, CallForm, call_names, longest_word, tool_names, with_short_ids
from .transcript import MARK, Ending, Span, Transcript

__all__ = ["IGNORE", "ChatTemplate", "Document", "Sample", "Segment", "TemplateOptions"]

HistoryThinking = Literal["split", "mask", "keep"]

_FOR_TOOLS = "give a --template (a jinja file) that does, or leave such rows out"
_SET_BY_THE_RUN = frozenset(["messages", "tools", "documents", "add_generation_prompt"])


@dataclass(frozen=True)
class Document:
    """The pieces of one document, and the conversation that it is: its messages say in `trained` what it trains.

    made_ids  its calls of tools have ids that were made for the template
    """

    conversation: Conversation
    pieces: list[Segment]
    made_ids: bool = False

    @property
    def special_in_text(self) -> int:
        """How many special tokens of the messages are tokenised as text."""
        return sum(piece.verbatim for piece in self.pieces)

    @property
    def weighted(self) -> bool:
        """Whether what is trained has a weight other than 1."""
        return any(piece.weight not in (0, 1) for piece in self.pieces)


@dataclass(frozen=True)
class TemplateOptions:
    """How a template is used; the flags of the same names.

    variables               of the template, for rows that do not set them themselves, such as enable_thinking
    history_thinking        what becomes of replies that the template prints without their thinking in the history
    special_tokens_in_text  special tokens that messages write are special tokens, not text
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    history_thinking: HistoryThinking = "split"
    special_tokens_in_text: bool = False


class ChatTemplate:
    """Renders conversations and tokenises them, with labels. It can be pickled.

    template  None (the tokenizer's own; "plain" where it has none), a name in `BUILT_IN`, or the path of a jinja file
    recorded  the jinja source that an adapter was trained with; it is used where `template` is None
    opened    what the tokenizer was loaded as: its files, its added tokens (which texts may write), its notes
    `description` says in words which one is used. Raises UserError for an unknown template, one that cannot be
    compiled, one that does not end a reply with a special token, and variables that it does not read.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        options: TemplateOptions = TemplateOptions(),
        *,
        recorded: str | None = None,
        opened: OpenedTokenizer | None = None,
    ):
        self.tokenizer, self.options, self.opened = tokenizer, options, opened
        self.added = () if opened is None else opened.added
        chosen = choose(tokenizer, template, recorded)
        self.description = chosen.description
        self.notes = (*(() if opened is None else opened.notes), *chosen.notes)
        self._names = dict(tokenizer.special_tokens_map)
        self._renderer = self._for_tools = Renderer(with_fixed_date(chosen.source), self.description)
        if chosen.for_tools is not None:
            self._for_tools = Renderer(with_fixed_date(chosen.for_tools), f"{self.description} for tools")
        self._check_variables(options.variables)
        self.source = with_fixed_date(with_defaults(options.variables, chosen.source))
        self._copied_as_it_is = chosen.own and self.source == chosen.source
        self._pieces_of = PieceTokenizer(tokenizer)
        self._reads_thinking = False
        self._ending = self._find_ending()
        self.end_token_id: int = tokenizer.get_vocab()[self._ending.end_token]
        self._reads_thinking = self._prints_thinking()
        self._special = SpecialTokens(self._structure())

    @classmethod
    def load(
        cls, folder: str | Path, template: str | None = None, options: TemplateOptions = TemplateOptions(),
        recorded: str | None = None,
    ) -> ChatTemplate:  # fmt: skip
        """Load the tokenizer of a Hugging Face folder and a template for it. Raises UserError."""
        return cls.of(open_tokenizer(folder), template, options, recorded)

    @classmethod
    def of(
        cls, opened: OpenedTokenizer, template: str | None, options: TemplateOptions, recorded: str | None = None
    ) -> ChatTemplate:
        """Build the template of a tokenizer that was opened. Raises UserError."""
        return cls(opened.tokenizer, template, options, recorded=recorded, opened=opened)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Where generation stops: the token that ends a reply, and the tokenizer's end of text."""
        eos = self.tokenizer.eos_token_id
        return (self.end_token_id,) if eos in (None, self.end_token_id) else (self.end_token_id, eos)

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint carries of it."""
        return {"chat_template": self.source, **({"added_tokens": entries_of(self.added)} if self.added else {})}

    def identity(self) -> str:
        """Return a hash of the template's source and of the options that change what it gives."""
        hashed = self.source
        options = self.options.history_thinking, self.options.special_tokens_in_text
        if options != (TemplateOptions().history_thinking, TemplateOptions().special_tokens_in_text):
            hashed += repr(options)
        hashed += repr([token.content for token in self.added]) if self.added else ""
        return hashlib.sha256(hashed.encode()).hexdigest()[:16]

    def write(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder, with this template. Raises UserError."""
        assert self.opened is not None, "a template that was not loaded from a folder"
        self.opened.write(folder, None if self._copied_as_it_is else self.source)

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the tokens that generation starts from: the messages (the user's last) and the start of a reply."""
        transcript, stop = self._transcript(conversation), len(conversation.messages)
        text = transcript.prompt(stop)
        spans = transcript.history(stop)
        return self._pieces_of.ids(self._pieces(transcript, text, spans))

    def text_prompt(self, text: str) -> list[int]:
        """Return the tokens of a text that generation goes on from, behind those that the tokenizer begins one with.

        Special tokens in it are text, as in messages. Raises UserError for a text with the marks of `SpecialTokens`.
        """
        marked = text if self.options.special_tokens_in_text else self._special.mark_text(text)
        pieces = [Segment(text, 0.0)] if marked is text else self._without_marks([Segment(marked, 0.0)])
        bare, begun = (self.tokenizer("a", add_special_tokens=own)["input_ids"] for own in (False, True))
        at = next((i for i in range(len(begun)) if begun[i : i + len(bare)] == bare), 0)
        return [*begun[:at], *self._pieces_of.ids(pieces)]

    def special_in_text(self, conversation: Conversation) -> int:
        """Return how many special tokens the messages write, which are tokenised as text."""
        return 0 if self.options.special_tokens_in_text else self._special.count(conversation)

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of n times as many has more than n tokens."""
        return max(map(len, self.tokenizer.get_vocab()))

    def encode(self, conversation: Conversation) -> list[Sample]:
        """Return the documents of a conversation as samples."""
        return self.tokenize([document.pieces for document in self.documents(conversation)])

    def documents(self, conversation: Conversation) -> list[Document]:
        """Return what of a conversation is trained, in one document or several.

        Of messages with trained=None the assistant's are trained. A text without turns is trained whole, between the
        tokens that begin and end one. Raises UserError where the template refuses the conversation or drops a part of
        it, and for thinking that is not closed.
        """
        conversation = _resolved(conversation)
        if conversation.text is not None:
            return [Document(conversation, self._of_text(conversation.text))]
        replies = [turn for turn, message in enumerate(conversation.messages) if message.role == "assistant"]
        if not replies:
            raise UserError("no message of the assistant, so there is nothing to learn", "add the reply")
        transcript = self._transcript(conversation)
        wanted = left = {turn for turn in replies if conversation.messages[turn].trained}
        found, turn = [], replies[-1]
        while True:
            text, spans = self._document(transcript, turn)
            trained = {span.turn for span in spans if span.as_generated and span.turn in left}
            part = _trains(conversation, turn, trained, wanted if turn == replies[-1] else set(replies))
            found.append(Document(part, self._pieces(transcript, text, spans, part), transcript.made_ids))
            left = left - trained
            if not left or self.options.history_thinking == "mask":
                return found[::-1]
            turn = max(left)

    def segments(self, conversation: Conversation) -> list[Segment]:
        """Return the document that ends with the last message, as `documents` gave it with its `conversation`."""
        if conversation.text is not None:
            return self._of_text(conversation.text)
        conversation = _resolved(conversation)
        transcript = self._transcript(conversation)
        text, spans = self._document(transcript, len(conversation.messages) - 1)
        return self._pieces(transcript, text, spans, conversation)

    def tokenize(self, documents: Sequence[Sequence[Segment]]) -> list[Sample]:
        """Turn documents given as pieces into samples, in few calls to the tokenizer (faster than one by one)."""
        return self._pieces_of.samples(documents)

    # Pieces

    def _document(self, transcript: Transcript, turn: int) -> tuple[str, list[Span]]:
        return transcript.kept(turn) if self.options.history_thinking == "keep" else transcript.document(turn)

    def _pieces(
        self, transcript: Transcript, text: str, spans: Sequence[Span], conversation: Conversation | None = None
    ) -> list[Segment]:
        """Return a text cut at its replies. conversation: says what is trained; None: nothing is."""
        messages = () if conversation is None else conversation.messages
        pieces, done, turn = [], 0, 0
        for span in spans:
            asked = replied = 0.0
            if messages:
                asked = min(map(_weight_of_prompt, messages[turn : span.turn]), default=0.0)
                replied = messages[span.turn].weight if messages[span.turn].trained and span.as_generated else 0.0
            pieces += [Segment(text[done : span.start], asked), Segment(text[span.start : span.stop], replied)]
            done, turn = span.stop, span.turn + 1
        if done < len(text):
            pieces.append(Segment(text[done:], 0.0))
        return self._without_marks(pieces) if transcript.marked else pieces

    def _without_marks(self, pieces: Sequence[Segment]) -> list[Segment]:
        return [
            Segment(text, piece.weight, verbatim)
            for piece in pieces
            for text, verbatim in self._special.cut(piece.text)
        ]

    def _of_text(self, text: str) -> list[Segment]:
        """Return a text between the tokens that begin and end one, where the tokenizer has them."""
        bos, eos = self._names.get("bos_token", ""), self._names.get("eos_token", "")
        if self.options.special_tokens_in_text:
            bos, eos = "" if text.startswith(bos) else bos, "" if eos and text.endswith(eos) else eos
            return [Segment(f"{bos}{text}{eos}", 1.0)]
        marked = self._special.mark_text(text)
        whole = [Segment(f"{bos}{marked}{eos}", 1.0)]
        return whole if marked is text else self._without_marks(whole)

    # Rendering

    def _transcript(self, conversation: Conversation) -> Transcript:
        """Return the texts of a conversation, which is checked to be printed whole."""
        self._check_variables(conversation.template_kwargs)
        if conversation.tools and "tools" not in self._for_tools.variables:
            raise UserError(f"{self.description} does not print tools", _FOR_TOOLS)
        marked = conversation if self.options.special_tokens_in_text else self._special.mark(conversation)
        form = self._form_of_calls(marked)
        spoken = with_short_ids(marked) if form.short_ids else marked

        def render(part: Conversation, add_generation_prompt: bool) -> Rendered:
            return self._render(part, add_generation_prompt, form)

        def blame(what: str) -> UserError:
            return UserError(f"{self.description} {what}", f"give another {OPTIONS}")

        renderer = self._for_tools if conversation.tools else self._renderer
        made = {"marked": marked is not conversation, "made_ids": spoken.messages != marked.messages}
        transcript = Transcript(spoken, render, self._ending, renderer.marks_replies, blame, **made)
        self._check_printed(marked, transcript)
        return transcript

    def _render(
        self, conversation: Conversation, add_generation_prompt: bool, form: CallForm = CALL_FORMS[0]
    ) -> Rendered:
        messages = conversation.messages
        if not self._reads_thinking:
            messages = tuple(message.with_thinking_in_content() for message in messages)
        variables = {
            **self._names,
            "tools": None,
            "documents": None,
            **self.options.variables,
            **conversation.template_arguments(),
            "messages": [form.written(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        renderer = self._for_tools if conversation.tools else self._renderer
        try:
            return renderer.render(size_of(variables["messages"]) + size_of(variables["tools"]), **variables)
        except Exception as error:  # whatever the template raises, and the sandbox
            reason = f"{self.description} refuses the conversation: {told(error)}"
            of_system = messages and messages[0].role == "system" and re.search("system|role", told(error).lower())
            remedy = "move the system text into the first user turn, or " if of_system else ""
            raise UserError(reason, f"{remedy}give another {OPTIONS}") from None

    def _form_of_calls(self, conversation: Conversation) -> CallForm:
        """Return how the template takes tool calls: the first form that prints them all."""
        names = call_names(conversation)
        if not names:
            return CALL_FORMS[0]
        problem = None
        for form in CALL_FORMS:
            try:
                spoken = with_short_ids(conversation) if form.short_ids else conversation
                text = self._render(spoken, False, form).text
            except UserError as error:
                problem = problem or error
                continue
            if all(name in text for name in names):
                return form
        if problem is not None:
            raise problem
        raise UserError(f"{self.description} does not print tool calls", _FOR_TOOLS)

    def _check_printed(self, conversation: Conversation, transcript: Transcript) -> None:
        """Raise UserError where a system text, tool or tool result is not in the text."""
        text = transcript.prompt(transcript.last_turn)
        for turn, message in enumerate(conversation.messages):
            if message.role == "system" and not transcript.prints_system(turn):
                remedy = f"move it into the first user turn, or give another {OPTIONS}"
                raise UserError(f"{self.description} drops the system text", remedy)
            if message.role == "tool" and longest_word(message.content) not in text:
                raise UserError(f"{self.description} does not print the results of tools", _FOR_TOOLS)
        for name in tool_names(conversation):
            if name not in text:
                raise UserError(f"{self.description} does not print the tools ({name})", _FOR_TOOLS)

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            if name in _SET_BY_THE_RUN or name in self._names:
                raise UserError(f"chat_template_kwargs: {name} is set by the run itself", "leave it out")
            if name not in self._renderer.variables | self._for_tools.variables:
                what = f"chat_template_kwargs: {self.description} does not read {name}"
                raise UserError(what, f"leave it out, or give another {OPTIONS}")

    # What the template is like

    def _find_ending(self) -> Ending:
        """Return how a reply ends: the text that follows one, up to its first special token."""
        probe = Conversation((Message("user", "Hi"), Message("assistant", MARK)))
        before, found, after = self._render(probe, add_generation_prompt=False).text.rpartition(MARK)
        if not found:
            raise UserError(f"{self.description} does not print the reply", f"give another {OPTIONS}")
        tokens = {*self.tokenizer.added_tokens_encoder, *self.tokenizer.all_special_tokens} - {"", *THINKING_TAGS}
        known = [(after.index(token), -len(token), token) for token in tokens if token in after]
        if not known:
            raise UserError(
                f"{self.description} ends a reply with {after!r}, with no special token of the tokenizer: "
                "generation could never stop",
                f"give another {OPTIONS} that ends replies with eos_token",
            )
        at, _, token = min(known)
        start = self._render(replace(probe, messages=probe.messages[:1]), add_generation_prompt=True).text
        lead = before[len(start) :] if before.startswith(start) and not before[len(start) :].strip() else ""
        return Ending(after, after[: at + len(token)], token, tuple(sorted(_special_tokens(self.tokenizer))), lead)

    def _prints_thinking(self) -> bool:
        """Return whether the template reads reasoning_content itself."""
        self._reads_thinking = True
        probe = Conversation((Message("user", "Hi"), Message("assistant", "Hi", thinking=MARK)))
        try:
            return MARK in self._render(probe, add_generation_prompt=False).text
        except UserError:
            return False

    def _structure(self) -> set[str]:
        """Return the tokens that give a conversation its structure: special ones, and added ones that stand around
        turns.
        """
        probe = Conversation((Message("user", "Hi"), Message("assistant", MARK)))
        text = self._render(probe, add_generation_prompt=False).text
        around = {token for token in self.tokenizer.added_tokens_encoder if token in text} - set(THINKING_TAGS)
        return (_special_tokens(self.tokenizer) - {token.content for token in self.added}) | around


def _special_tokens(tokenizer: Any) -> set[str]:
    flagged = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {str(token) for token in (*flagged, *tokenizer.all_special_tokens) if str(token)}


def _weight_of_prompt(message: Message) -> float:
    """Return what the text of a message before a reply counts for; several before one reply count for the least of
    theirs.
    """
    return message.weight if message.trained and message.role != "assistant" else 0.0


def _resolved(conversation: Conversation) -> Conversation:
    """Return the conversation with `trained` set where it is not."""
    if all(message.trained is not None for message in conversation.messages):
        return conversation
    messages = tuple(
        message.with_trained(message.role == "assistant") if message.trained is None else message
        for message in conversation.messages
    )
    return conversation.with_messages(messages)


def _trains(conversation: Conversation, turn: int, trained: set[int], wanted: set[int]) -> Conversation:
    """Return the messages up to `turn`, of which the replies `trained` are trained.

    What is before a reply keeps its own flag where that reply is trained, or is not among those that are `wanted` (in
    this document or another).
    """
    messages = list(conversation.messages[: turn + 1])
    keeps = False
    for number in range(turn, -1, -1):
        message = messages[number]
        if message.role == "assistant":
            keeps = number in trained or number not in wanted
            flag = number in trained
        else:
            flag = bool(message.trained) and keeps
        if flag != message.trained:
            messages[number] = replace(message, trained=flag)
    if tuple(messages) == conversation.messages:
        return conversation
    return replace(conversation, messages=tuple(messages))
