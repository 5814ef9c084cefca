"""Bodies of requests: JSON of OpenAI's API -> what is asked. A field is read, refused by name, or has no effect anyhow.

Beside OpenAI's fields: top_k, min_p, repetition_penalty, and chat_template_kwargs, as other servers have them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megalora.data import Conversation, to_question
from megalora.errors import UserError
from megalora.files import unique_fields
from megalora.generation.sampling import Sampling
from megalora.serving.errors import bad
from megalora.serving.images import PART, take_image

MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 16, 16, 20
_LARGEST_SEED = 2**63 - 1

# Fields that say nothing about the reply.
_WITHOUT_EFFECT = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention".split()
)
# Fields that would change the reply, with the values at which they do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
# Fields of a message that are read, or say nothing to a model; and the parts that a content may have.
_MESSAGE_FIELDS = frozenset(
    "role content name tool_calls tool_call_id function_call reasoning_content reasoning thinking "
    "annotations id refusal".split()
)
_PARTS = ("text", "input_text", "output_text", "reasoning", "thinking", "reasoning_content")
_REMEDIES = {
    "frequency_penalty": "leave it out, or give repetition_penalty",
    "presence_penalty": "leave it out, or give repetition_penalty",
}


@dataclass(frozen=True)
class Asked:
    """What one HTTP request asks.

    conversation    of a chat; None: `prompts` are to be continued, each a text or token ids
    max_new_tokens  None: as many as there is room for
    logprobs        None, or how many likeliest tokens to tell beside each token
    image           the URL of the image before the text of a chat, None where the model reads none: megabytes
    """

    model: str
    conversation: Conversation | None
    prompts: tuple[str | tuple[int, ...], ...]
    sampling: Sampling
    max_new_tokens: int | None
    choices: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: int | None
    image: str | None = None


def read_json(data: bytes) -> dict[str, Any]:
    """Return the object of a body. Raises ApiError where it is none, or has a text that is not Unicode."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        value = json.loads(data, parse_constant=refuse, object_pairs_hook=unique_fields)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise bad("the body has half of a surrogate pair (as \\ud83d), or is not UTF-8: fix the text") from None
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise bad(f"the body is not JSON ({why:.200}): send one JSON object") from None
    if not isinstance(value, dict):
        raise bad("the body is not a JSON object: send one")
    return value


def read_chat(body: Mapping[str, Any], defaults: Mapping[str, float], images: bool = False) -> Asked:
    """Return what the body of /v1/chat/completions asks. Raises ApiError.

    defaults  of the sampling; images: the model reads one before each text
    """
    fields = _Fields(body)
    messages = fields.take("messages", _is_list, "a list of messages")
    if not messages:
        raise bad("messages is empty or missing: give at least one message of the user", "messages")
    tools = fields.take("tools", _is_list, "a list of tools")
    choice = fields.take("tool_choice", lambda v: v in ("auto", "none"), "auto or none (others are not supported)")
    variables = fields.take("chat_template_kwargs", lambda v: isinstance(v, dict), "an object") or {}
    effort = fields.take("reasoning_effort", lambda v: isinstance(v, str), "a string")
    if effort is not None:  # the template says whether it reads it
        variables = {"reasoning_effort": effort, **variables}
    wanted = fields.take("logprobs", _is_bool, "true or false")
    likeliest = fields.take("top_logprobs", _whole(0, MOST_LOGPROBS), f"a whole number from 0 to {MOST_LOGPROBS}")
    if likeliest is not None and not wanted:
        raise bad("top_logprobs has no effect without logprobs true: set logprobs, or leave it out", "top_logprobs")
    longest = _longest(fields, "max_completion_tokens", "max_tokens")
    tools, image = None if choice == "none" else tools, None
    if images:
        message, image = take_image(messages)
        conversation = _about_image(message, tools, variables)
    else:
        conversation = _conversation(messages, tools, variables)
    asked = _asked(fields, defaults, conversation, (), longest, (likeliest or 0) if wanted else None)
    return replace(asked, image=image)


def read_completion(body: Mapping[str, Any], defaults: Mapping[str, float], images: bool = False) -> Asked:
    """Return what the body of /v1/completions asks, as `read_chat`."""
    if images:
        raise bad("a prompt has no place for the image that this model reads: use /v1/chat/completions", "prompt")
    fields = _Fields(body)
    prompt = fields.take("prompt", lambda v: True, "")
    likeliest = fields.take("logprobs", _whole(0, MOST_LOGPROBS), f"a whole number from 0 to {MOST_LOGPROBS}")
    return _asked(fields, defaults, None, _prompts(prompt), _longest(fields, "max_tokens"), likeliest)


def _asked(
    fields: _Fields,
    defaults: Mapping[str, float],
    conversation: Conversation | None,
    prompts: tuple[str | tuple[int, ...], ...],
    longest: int | None,
    logprobs: int | None,
) -> Asked:
    """Return what both kinds of request have."""
    stream = bool(fields.take("stream", _is_bool, "true or false"))
    options = fields.take("stream_options", lambda v: isinstance(v, dict), "an object")
    if options is not None and not stream:
        raise bad("stream_options has no effect without stream true: set stream, or leave it out", "stream_options")
    inner = _Fields(options or {}, "stream_options.")
    include_usage = bool(inner.take("include_usage", _is_bool, "true or false"))
    inner.take("include_obfuscation", lambda v: v is False, "false: nothing is padded here")
    inner.finish()
    model = fields.take("model", lambda v: isinstance(v, str), "the name of a model, as /v1/models lists them")
    if model is None:
        raise bad("model is missing: name one that /v1/models lists", "model")
    choices = fields.take("n", _whole(1, MOST_CHOICES), f"a whole number from 1 to {MOST_CHOICES}") or 1
    asked = Asked(
        model,
        conversation,
        prompts,
        _sampling(fields, defaults),
        longest,
        choices,
        _stops(fields),
        stream,
        include_usage,
        logprobs,
    )
    fields.finish()
    return asked


class _Fields:
    """The fields of an object, each taken once; null is as if it were not there. `finish` refuses what nobody took."""

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self._left = {name: value for name, value in values.items() if value is not None}
        self._prefix = prefix

    def take(self, name: str, right: Any, expected: str) -> Any:
        """Return the value of a field, None where it is not there. Raises ApiError where `right(value)` is not true."""
        value = self._left.pop(name, None)
        if value is not None and not right(value):
            shown = json.dumps(value, ensure_ascii=False)
            raise bad(f"{self._prefix}{name} is {shown:.80}: it must be {expected}", self._prefix + name)
        return value

    def finish(self) -> None:
        for name, value in self._left.items():
            if name in _WITHOUT_EFFECT and not self._prefix:
                continue
            if name in _NEUTRAL and not self._prefix and value in _NEUTRAL[name]:
                continue
            what = "is not supported" if name in _NEUTRAL else "is not a field that this server knows"
            named = self._prefix + name[:80]
            raise bad(f"{named} {what}: {_REMEDIES.get(name, 'leave it out')}", named)


def _sampling(fields: _Fields, defaults: Mapping[str, float]) -> Sampling:
    """Return how to sample: by the request, and by the model's own `defaults` where it says nothing."""
    given = {
        "temperature": fields.take("temperature", _number(0, 100), "a number from 0 to 100"),
        "top_k": fields.take("top_k", _whole(-1, 10**9), "a whole number; 0 or -1 is all tokens"),
        "top_p": fields.take("top_p", _number(0, 1, above=True), "a number above 0, at most 1"),
        "min_p": fields.take("min_p", _number(0, 1), "a number from 0 to 1"),
        "repetition_penalty": fields.take("repetition_penalty", _number(0, 100, above=True), "a number above 0"),
    }
    chosen = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    if given["temperature"] is None and not chosen["temperature"]:
        for name in ("top_k", "top_p", "min_p"):
            if given[name] not in (None, 0, -1) and (name, given[name]) != ("top_p", 1):
                raise bad(f"{name} has no effect: the model's own temperature is 0; give temperature as well", name)
    seed = fields.take("seed", _whole(-(2**63), 2**64), "a whole number of 64 bits")
    seed = secrets.randbelow(_LARGEST_SEED) if seed is None else seed % (_LARGEST_SEED + 1)
    top_k, top_p = int(chosen["top_k"] or 0), chosen["top_p"]
    return Sampling(
        float(chosen["temperature"] or 0.0),
        top_k if top_k > 0 else None,
        None if top_p is None or top_p >= 1 else float(top_p),
        float(chosen["min_p"]) if chosen["min_p"] else None,
        float(chosen["repetition_penalty"] or 1.0),
        seed,
    )


def _stops(fields: _Fields) -> tuple[str, ...]:
    def right(value: Any) -> bool:
        texts = value if isinstance(value, list) else [value]
        return len(texts) <= MOST_STOPS and all(isinstance(text, str) and 0 < len(text) <= 1000 for text in texts)

    found = fields.take("stop", right, f"a string of 1 to 1,000 characters, or a list of at most {MOST_STOPS} of them")
    return () if found is None else (found,) if isinstance(found, str) else tuple(found)


def _longest(fields: _Fields, *names: str) -> int | None:
    given = {name: fields.take(name, _whole(1, 10**9), "a whole number of at least 1") for name in names}
    found = [value for value in given.values() if value is not None]
    if len(set(found)) > 1:
        raise bad(f"{' and '.join(names)} are both given, and differ: give one of them", names[-1])
    return found[0] if found else None


def _conversation(
    messages: list[Any], tools: list[Any] | None, variables: Mapping[str, Any], reads: str = "text alone"
) -> Conversation:
    """Return the messages as a conversation. Raises ApiError as the reader of training rows finds fault with them.

    reads  what the server does, in words
    """
    for number, message in enumerate(messages):
        if isinstance(message, dict):
            _check_message(message, f"messages[{number}]", reads)
    last = messages[-1]
    if isinstance(last, dict) and last.get("role") not in ("user", "tool"):
        raise bad("the last message must be the user's or a tool's: a reply is made to it", "messages")
    row: dict[str, Any] = {"messages": messages} | ({"tools": tools} if tools else {})
    try:
        found = to_question(row, "messages")
    except UserError as error:
        raise bad(str(error), "messages") from None
    return Conversation(found.messages, found.tools, {**found.template_kwargs, **variables})


def _about_image(message: dict[str, Any], tools: list[Any] | None, variables: Mapping[str, Any]) -> Conversation:
    """Return the message of an image as a conversation; its text may be empty."""
    empty = not message["content"]
    written = {**message, "content": "."} if empty else message  # readers of rows refuse an empty one
    found = _conversation([written], tools, variables, f"text and one {PART}")
    if not empty:
        return found
    return replace(found, messages=(replace(found.messages[0], content=""),))


def _check_message(message: Mapping[str, Any], place: str, reads: str) -> None:
    """Raise ApiError for fields and parts that rows of training data may have, or that no text can be made of."""
    for name, value in message.items():
        if name not in _MESSAGE_FIELDS and value not in (None, "", [], {}):
            raise bad(f"{place} has {name[:40]!r}, which this server does not know: leave it out", "messages")
    parts = message.get("content")
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict) and part.get("type") not in _PARTS:
            kind = str(part.get("type"))[:40]
            raise bad(f"{place} has a part of type {kind!r}: this server reads {reads}", "messages")


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Return the prompts of a completion: a text, token ids, or a list of either."""
    wrong = bad("prompt must be a text, a list of texts, token ids, or a list of lists of token ids", "prompt")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise wrong
    if all(_is_id(item) for item in value):
        value = [value]
    if len(value) > MOST_CHOICES:
        raise bad(f"prompt has {len(value)} prompts: send at most {MOST_CHOICES} in one request", "prompt")
    found: list[str | tuple[int, ...]] = []
    for item in value:
        if isinstance(item, list) and item and all(_is_id(one) for one in item):
            found.append(tuple(item))
        elif isinstance(item, str) and item:
            found.append(item)
        else:
            raise wrong
    return tuple(found)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _whole(least: int, most: int) -> Any:
    return lambda value: _is_id(value) and least <= value <= most


def _number(least: float, most: float, above: bool = False) -> Any:
    def right(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and (least < value if above else least <= value) and value <= most

    return right

