"""Answers in OpenAI's form: whole, or as a stream of events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from megalora.generation.sampling import Logprobs
from megalora.serving.errors import FAILED, ApiError
from megalora.serving.replies import Part, Replies

Spell = Callable[[int], str]
Told = Sequence[tuple[int, Logprobs]]


class Answer:
    """The answer to one request.

    spell  gives the text of a token by itself
    """

    def __init__(self, replies: Replies, spell: Spell):
        self._replies, self._spell = replies, spell
        self._chat = replies.asked.conversation is not None
        self._offsets: dict[int, int] = {}
        kind = "chat.completion" if self._chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": replies.model.name,
        }
        self._kind = kind

    async def whole(self) -> dict[str, Any]:
        """Return the JSON of all replies. Raises ApiError where one fails."""
        parts: dict[int, list[Part]] = {}
        async for part in self._replies.parts():
            parts.setdefault(part.choice, []).append(part)
        choices = [self._whole_choice(number, parts[number]) for number in sorted(parts)]
        return {**self._head, "object": self._kind, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the replies as server-sent events, part by part."""
        try:
            begun: set[int] = set()
            async for part in self._replies.parts():
                yield self._event([self._chunk(part, part.choice not in begun)])
                begun.add(part.choice)
            if self._replies.asked.include_usage:
                yield self._event([], usage=self._usage())
        except ApiError as error:
            yield _sse(error.body())
            return
        except Exception:
            yield _sse(ApiError(500, FAILED).body())
            raise
        yield b"data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        kind = "chat.completion.chunk" if self._chat else self._kind
        body = {**self._head, "object": kind, "choices": choices}
        if self._replies.asked.include_usage:
            body["usage"] = usage
        return _sse(body)

    def _whole_choice(self, number: int, parts: Sequence[Part]) -> dict[str, Any]:
        content, reasoning = ("".join(getattr(part, name) for part in parts) for name in ("content", "reasoning"))
        tokens = [token for part in parts for token in part.tokens]
        choice = {"index": number, "finish_reason": parts[-1].finish_reason, "logprobs": self._logprobs(number, tokens)}
        if not self._chat:
            return {**choice, "text": content}
        calls = [call.written() for part in parts for call in part.calls]
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        return {**choice, "message": message | ({"tool_calls": calls} if calls else {})}

    def _chunk(self, part: Part, first: bool) -> dict[str, Any]:
        logprobs = self._logprobs(part.choice, part.tokens) if part.tokens else None
        choice = {"index": part.choice, "finish_reason": part.finish_reason, "logprobs": logprobs}
        if not self._chat:
            return {**choice, "text": part.content}
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if part.reasoning:
            delta["reasoning_content"] = part.reasoning
        if part.calls:
            delta["tool_calls"] = [call.written(index=True) for call in part.calls]
        if part.content or (first and not part.reasoning and not part.calls):
            delta["content"] = part.content
        return {**choice, "delta": delta}

    def _usage(self) -> dict[str, int]:
        prompt, reply = self._replies.prompt_tokens, self._replies.tokens
        return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}

    # ---- log-probabilities ----

    def _logprobs(self, number: int, tokens: Told) -> dict[str, Any] | None:
        if self._replies.asked.logprobs is None:
            return None
        if not self._chat:
            return self._completion_logprobs(number, tokens)
        content = [
            {
                **self._token(token_id, told.chosen),
                "top_logprobs": [self._token(other, value) for other, value in told.likeliest],
            }
            for token_id, told in tokens
        ]
        return {"content": content, "refusal": None}

    def _completion_logprobs(self, number: int, tokens: Told) -> dict[str, Any]:
        texts, offsets = [self._spell(token_id) for token_id, _ in tokens], []
        for text in texts:
            offsets.append(self._offsets.get(number, 0))
            self._offsets[number] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [told.chosen for _, told in tokens],
            "top_logprobs": [{self._spell(other): value for other, value in told.likeliest} for _, told in tokens],
            "text_offset": offsets,
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._spell(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}


def _sse(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"
