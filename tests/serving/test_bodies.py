"""Bodies of a stranger: whatever they are, an ApiError in one line or sound arguments."""

from __future__ import annotations

import base64
import json
from unittest import mock

import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as some

from megalora.serving.bodies import Asked, read_chat, read_completion, read_json
from megalora.serving.errors import ApiError
from megalora.serving.images import ImageInput

NAMES = """model messages prompt max_tokens max_completion_tokens temperature top_p top_k min_p repetition_penalty n
stop seed stream stream_options logprobs top_logprobs tools tool_choice reasoning_effort chat_template_kwargs user
logit_bias response_format best_of echo suffix""".split()
INNER = "role content type text function image_url url detail".split()
LEAVES = (
    some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text(max_size=20)
    | some.sampled_from(["user", "assistant", "auto", 10**400, -1, 0, 1, "\ud800"])
)  # fmt: skip
VALUES = some.recursive(
    LEAVES,
    lambda inner: some.lists(inner, max_size=4)
    | some.dictionaries(some.sampled_from([*NAMES, *INNER]), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = some.lists(
    some.fixed_dictionaries({"role": some.sampled_from(["user", "system", "tool"]) | LEAVES, "content": VALUES}),
    max_size=4,
)
IMAGES = some.lists(
    some.just({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}})
    | some.fixed_dictionaries({"type": some.just("image_url"), "image_url": VALUES})
    | some.fixed_dictionaries({"type": some.sampled_from(["text", "image_url"]) | LEAVES, "text": VALUES}),
    max_size=3,
)
BODIES = some.dictionaries(some.sampled_from([*NAMES, "made_up"]), VALUES, max_size=6)


def sound(asked: Asked, images: bool = False) -> None:
    assert isinstance(asked.image, str) is images and (not images or len(asked.conversation.messages) == 1)
    sampling = asked.sampling
    assert 0 <= sampling.temperature <= 100 and 0 <= sampling.seed < 2**63 and sampling.repetition_penalty > 0
    assert sampling.top_k is None or sampling.top_k > 0
    assert sampling.top_p is None or 0 < sampling.top_p < 1
    assert sampling.min_p is None or 0 < sampling.min_p <= 1
    assert asked.max_new_tokens is None or asked.max_new_tokens > 0
    assert 1 <= asked.choices <= 16 and all(asked.stop)
    assert bool(asked.prompts) == (asked.conversation is None)


def tried(work, images: bool = False) -> None:
    try:
        asked = work()
    except ApiError as error:
        assert 400 <= error.status < 500 and error.message and "\n" not in error.message and len(error.message) < 2000
    else:
        if isinstance(asked, Asked):
            sound(asked, images)


@examples(300)
@given(BODIES, MESSAGES)
def test_any_object(body, messages):
    data = json.dumps(body).encode()
    tried(lambda: read_completion(read_json(data), {}))
    tried(lambda: read_chat(read_json(data), {"temperature": 0.5, "top_p": 0.9, "top_k": 5}))
    full = json.dumps({"model": "m", **body, "messages": messages}).encode()
    tried(lambda: read_chat(read_json(full), {}))


@examples(300)
@given(BODIES, IMAGES)
def test_any_message_with_images(body, parts):
    full = json.dumps({"model": "m", **body, "messages": [{"role": "user", "content": parts}]}).encode()
    tried(lambda: read_chat(read_json(full), {}, True), images=True)
    tried(lambda: read_chat(read_json(full), {}))


@examples(300)
@given(
    some.text(max_size=40).map("data:image/png;base64,".__add__)
    | some.binary(max_size=60).map(lambda data: f"data:image/gif;base64,{base64.b64encode(b'GIF89a' + data).decode()}")
    | some.text("data:imge/pnx;bs64,=+ Aé\x00", max_size=40)
)
def test_any_url(url):
    prefix = type("Prefix", (), {"tokens": 4, "placeholder": 7})
    tried(lambda: ImageInput(prefix, mock.Mock()).read(url))


@examples(200)
@given(some.binary(max_size=200) | some.text('{}[]",:0123456789e+-.\\untrfalsmodp', max_size=60).map(str.encode))
def test_any_bytes(data):
    tried(lambda: read_json(data))


def test_sampling_is_the_models_own_where_the_request_is_silent():
    body = {"model": "m", "prompt": "x"}
    own = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    taken = read_completion(body, own).sampling
    assert (taken.temperature, taken.top_p, taken.top_k, taken.repetition_penalty) == (0.7, 0.9, 20, 1.1)
    given_here = read_completion(body | {"temperature": 0, "top_p": 1, "top_k": -1}, own).sampling
    assert (given_here.temperature, given_here.top_p, given_here.top_k) == (0.0, None, None)
    assert read_completion(body | {"seed": -5}, {}).sampling.seed == 2**63 - 5
    for name, value in (("top_p", 0.5), ("top_k", 5), ("min_p", 0.1)):
        with pytest.raises(ApiError, match=f"{name} has no effect: the model's own temperature is 0"):
            read_completion(body | {name: value}, {})
        assert getattr(read_completion(body | {name: value, "temperature": 1}, {}).sampling, name) == value
    read_completion(body | {"top_p": 1, "top_k": -1, "min_p": 0}, {})
    for huge in (10**400, -(10**400)):
        with pytest.raises(ApiError, match="temperature is"):
            read_completion(body | {"temperature": huge}, {})
    with pytest.raises(ApiError, match="made_up is not a field"):
        read_completion(body | {"user": "me", "metadata": {}, "made_up": 1}, {})
