"""Chat template: messages -> tokens and labels, the same for training and for generation.

A document is the prompt exactly as generation gets it, then the last reply and its end token:

    <|im_start|>user\\nWho are you?<|im_end|>\\n<|im_start|>assistant\\n  I am Mega.<|im_end|>
    |------------------------ prompt: -100 ---------------------------|------ labels ------|

Replies in the history are labelled too, with their end token, as the template renders them there (a template
that drops the thinking of earlier turns drops it here). The thinking of the last reply is always trained on.

Text is cut at every boundary of a reply and each piece is tokenised by itself, so that no token straddles a
boundary: labels are exact, and the prompt's tokens do not depend on what follows. `prompt` cuts the same way.
The reply pieces are found by rendering the conversation once more with a marker in place of that reply.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from ..errors import UserError
from .conversation import MessageDict as Message

IGNORE = -100
MARK = "megalora-reply-marker"

# Every built-in starts with the tokenizer's own beginning-of-text token, where it sets one before any text.
BUILT_IN = {
    "plain": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}

# Templates that print today's date (Llama 3.2) print this one, the date Llama 3's own template falls back to:
# a run is the same run tomorrow, and generation gets the prompt of training. The macro hides the function of
# that name which transformers hands to templates.
FIXED_DATE = (
    "{% macro strftime_now(form) %}{{ form"
    " | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%y', '24') | replace('%Y', '2024') | replace('%A', 'Friday') | replace('%a', 'Fri')"
    " | replace('%H', '00') | replace('%M', '00') | replace('%S', '00') }}{% endmacro %}"
)
OPTIONS = f"--template ({' | '.join(BUILT_IN)} | a jinja file)"


@dataclass(frozen=True)
class Sample:
    """One document. input_ids [n] int32; labels [n] int32, not shifted: labels[t] is input_ids[t] or -100."""

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Segment:
    """A piece of a document's text that is tokenised by itself; `trained` pieces carry labels."""

    text: str
    trained: bool


class ChatTemplate:
    """Renders messages and tokenises them, with labels.

    template: None (the tokenizer's own; "plain" where it has none), a name in `BUILT_IN`, or the path of a
    jinja file. `description` says in words which one is used. Raises UserError for an unknown template, and
    for one that does not end a reply with a special token.
    """

    def __init__(self, tokenizer: Any, template: str | None = None):
        self.tokenizer = tokenizer
        source, self.description = _choose(tokenizer, template)
        self._jinja = FIXED_DATE + source if "strftime_now" in source else source
        self._guard = _guard_ids(tokenizer)
        self._after_reply = self._probe()
        self._end, self.end_token_id = self._end_marker()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Where generation stops: the token that ends a reply, and the tokenizer's end of text."""
        eos = self.tokenizer.eos_token_id
        return (self.end_token_id,) if eos in (None, self.end_token_id) else (self.end_token_id, eos)

    def identity(self) -> str:
        """A hash of the template's source."""
        return hashlib.sha256(self._jinja.encode()).hexdigest()[:16]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that generation starts from: `messages` (the user's last) and the start of a reply."""
        return self._tokenize_texts([self._prompt_segments(messages)])[0][0]

    def encode(self, messages: Sequence[Message]) -> Sample:
        """The document of a conversation whose last message is the assistant's."""
        return self.tokenize([self.segments(messages)])[0]

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The pieces of a document's text, not yet tokenised. Raises UserError where the template refuses."""
        prompt = self._prompt_segments(messages[:-1])
        return [*prompt, Segment(self._last_reply(messages, "".join(piece.text for piece in prompt)), True)]

    def tokenize(self, documents: Sequence[Sequence[Segment]]) -> list[Sample]:
        """Documents given as pieces -> samples, in one call to the tokenizer (faster than one by one)."""
        samples = []
        for ids, trained in self._tokenize_texts(documents):
            input_ids = np.asarray(ids, dtype=np.int32)
            labels = np.where(np.asarray(trained, dtype=bool), input_ids, np.int32(IGNORE))
            samples.append(Sample(input_ids, labels))
        return samples

    # Text

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._jinja,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            has_system = any(message["role"] == "system" for message in messages)
            remedy = "move the system text into the first user turn, or " if has_system else ""
            raise UserError(
                f"{self.description} refuses the conversation: {error}; {remedy}give another {OPTIONS}"
            ) from None

    def _prompt_segments(self, messages: Sequence[Message]) -> list[Segment]:
        text = self._render(messages, add_generation_prompt=True)
        for message in messages:
            if message["role"] == "system" and message["content"].strip() not in text:
                remedy = f"move it into the first user turn, or give another {OPTIONS}"
                raise UserError(f"{self.description} drops the system text; {remedy}")
        segments, done = [], 0
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                start, stop = self._find_reply(messages, turn, text)
                segments += [Segment(text[done:start], False), Segment(text[start:stop], True)]
                done = stop
        return [*segments, Segment(text[done:], False)]

    def _find_reply(self, messages: Sequence[Message], turn: int, text: str) -> tuple[int, int]:
        """Where the reply of `turn` and its end marker lie in `text`, which `messages` render to."""
        mark = MARK
        while mark in text:
            mark += "+"
        marked = [*messages[:turn], {"role": "assistant", "content": mark}, *messages[turn + 1 :]]
        before, _, after = self._render(marked, add_generation_prompt=True).partition(mark)
        start, stop = len(before), len(text) - len(after)
        prompt = self._render(messages[:turn], add_generation_prompt=True)
        if text.startswith(prompt) and len(prompt) < start:
            start = len(prompt)  # what goes before a reply (Llama 2's space) generation has to write
        if start > stop or not (text.startswith(before) and text.endswith(after)):
            what = f"renders message {turn + 1} so that its reply cannot be found in the text"
            raise UserError(f"{self.description} {what}; give another {OPTIONS}")
        return start, stop + len(self._end) if text.startswith(self._end, stop) else stop

    def _last_reply(self, messages: Sequence[Message], prompt: str) -> str:
        """The text to learn after `prompt`: the template's own if it goes on from there and loses nothing."""
        content = messages[-1]["content"]
        full = self._render(messages, add_generation_prompt=False)
        reply = full[len(prompt) :]
        keeps_thinking = "</think>" not in content or "</think>" in reply
        if full.startswith(prompt) and reply.endswith(self._after_reply) and keeps_thinking:
            return reply[: len(reply) - len(self._after_reply)] + self._end
        if prompt.rstrip().endswith("<think>"):  # generation starts inside the thinking, so training does too
            if content.lstrip().startswith("<think>"):
                content = content.lstrip().removeprefix("<think>").removeprefix("\n")
            elif "</think>" not in content:
                content = "\n</think>\n\n" + content  # no thinking: close the empty one, as Qwen3 does
        return content + self._end

    def _probe(self) -> str:
        """The text that follows a reply at the end of a conversation, such as "<|im_end|>\\n"."""
        probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}]
        _, found, after = self._render(probe, add_generation_prompt=False).rpartition(MARK)
        if not found:
            raise UserError(f"{self.description} does not print the reply; give another {OPTIONS}")
        return after

    def _end_marker(self) -> tuple[str, int]:
        """What ends a reply: the text after it up to its first special token, and that token's id."""
        after, vocabulary = self._after_reply, self.tokenizer.get_vocab()
        tokens = {*self.tokenizer.added_tokens_encoder, *self.tokenizer.all_special_tokens}
        found = [(after.index(token), -len(token), token) for token in tokens if token and token in after]
        if not found:
            raise UserError(
                f"{self.description} ends a reply with {after!r}, with no special token of the tokenizer: "
                f"generation could never stop; give another {OPTIONS} that ends replies with eos_token"
            )
        at, _, token = min(found)
        return after[: at + len(token)], vocabulary[token]

    # Tokens

    def _tokenize_texts(self, documents: Sequence[Sequence[Segment]]) -> list[tuple[list[int], list[bool]]]:
        """Per document: token ids, and for each whether it is trained on."""
        texts = [
            "\n" + piece.text if number and self._guard is not None else piece.text
            for pieces in documents
            for number, piece in enumerate(pieces)
        ]
        if not texts:
            return []
        # verbose=False: documents longer than the tokenizer's model_max_length are judged elsewhere
        encoding = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        encoded, result = iter(encoding["input_ids"]), []
        for pieces in documents:
            ids, trained = [], []
            for number, piece in enumerate(pieces):
                piece_ids = next(encoded)
                if number and self._guard is not None:
                    assert piece_ids[: len(self._guard)] == self._guard, "the guard merged with the text"
                    piece_ids = piece_ids[len(self._guard) :]
                ids += piece_ids
                trained += [piece.trained] * len(piece_ids)
            result.append((ids, trained))
        return result


def _choose(tokenizer: Any, template: str | None) -> tuple[str, str]:
    """The jinja source, and a phrase that says where it is from."""
    own = tokenizer.chat_template
    if template is None and own:
        source = own if isinstance(own, str) else tokenizer.get_chat_template()
        return source, "the tokenizer's chat template"
    name = template or "plain"
    if name in BUILT_IN:
        why = "" if template else " (the tokenizer has no chat template)"
        return _bos(tokenizer) + BUILT_IN[name], f"the built-in template {name}{why}"
    try:
        return Path(name).read_text(encoding="utf-8"), f"the template {name}"
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{name} is no built-in template and cannot be read as a jinja file ({error})"
        raise UserError(f"--template: {reason}; give {OPTIONS}") from None


def _bos(tokenizer: Any) -> str:
    """Jinja for the beginning-of-text token, where the tokenizer itself sets one before a text."""
    bos = tokenizer.bos_token_id
    return "{{ bos_token }}" if bos is not None and tokenizer("a")["input_ids"][0] == bos else ""


def _guard_ids(tokenizer: Any) -> list[int] | None:
    """Tokens of "\\n" where the tokenizer sets a space before any text (sentencepiece), else None.

    There a piece from the middle of a text is tokenised behind a newline, which is taken off again, so that
    it gets no space of its own. A newline is a byte token in such vocabularies and merges with nothing.
    """
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return tokenizer("\n", add_special_tokens=False)["input_ids"] if first.startswith("\u2581") else None
