"""The server before a replica that says what it is told to: thinking apart, failures, and ends before the time."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import threading

import pytest
from talking import END, tokenizer
from waiting import PATIENCE, until

from megalora.data import ChatTemplate
from megalora.generation.requests import FAILED, STOP, Reply
from megalora.generation.text import Reader

pytest.importorskip("starlette")

from megalora.serving.app import build_app  # noqa: E402
from megalora.serving.backlog import Backlog  # noqa: E402
from megalora.serving.models import Catalogue, ServedModel  # noqa: E402
from megalora.serving.toolcalls import TAGS  # noqa: E402
from megalora.web.guard import allowed_hosts  # noqa: E402
from megalora.web.server import bind, served  # noqa: E402

TOKENIZER = tokenizer()
THINKING = "<think>\nLet me see.\n</think>\n\nIt is 4."
SLOTS, WAITING = 2, 3
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATE = (  # chatml that prints tools
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Replica(threading.Thread):
    """Replies to each request with `text`, a token at a time; holds where `go` is not set."""

    def __init__(self, backlog):
        super().__init__(daemon=True)
        self.backlog, self.text, self.end, self.go = backlog, THINKING, STOP, threading.Event()
        self.go.set()

    def run(self):
        while (requests := self.backlog.wait(1)) is not None:
            for request in requests:
                said, end = [], self.end
                for token in TOKENIZER(self.text)["input_ids"]:
                    while not self.go.wait(0.01) and not self.backlog._aborted:
                        pass
                    if verdict := self.backlog.hear(request.prompt, token, None):
                        end = verdict
                        break
                    said.append(token)
                self.backlog.waiting()
                self.backlog.done(request.prompt, Reply(tuple(said), end))


@contextlib.contextmanager
def serving():
    template = ChatTemplate(TOKENIZER, recorded=TEMPLATE)
    models = {"m": ServedModel("m", 0, template, (END,))}
    catalogue = Catalogue(models, Reader(TOKENIZER), Reader(TOKENIZER, shown=TAGS), len(TOKENIZER), {}, 500, {}, 0)
    backlog = Backlog(SLOTS, WAITING)
    replica = Replica(backlog)
    replica.start()
    with bind("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]

        def ask(**more):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            body = {"model": "m", "messages": [{"role": "user", "content": "2 + 2?"}]} | more
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read().decode()
            connection.close()
            if not more.get("stream"):
                return response.status, json.loads(data)
            return response.status, [json.loads(line[6:]) for line in data.splitlines() if line.startswith("data: {")]

        with served(build_app(catalogue, backlog, allowed_hosts("127.0.0.1"), None), listening, 100):
            yield replica, backlog, ask
        backlog.abort()
    replica.join(PATIENCE)


def test_the_server():
    with serving() as (replica, backlog, ask):
        status, answer = ask()
        assert status == 200
        message = {"role": "assistant", "content": "It is 4.", "reasoning_content": "Let me see."}
        assert answer["choices"][0]["message"] == message
        assert answer["usage"]["completion_tokens"] == len(THINKING)
        status, chunks = ask(stream=True)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Let me see."
        assert "".join(delta.get("content", "") for delta in deltas) == "It is 4."
        assert ask(stop="see")[1]["choices"][0]["message"]["reasoning_content"] == "Let me"

        arguments = {"city": "Paris"}
        call = json.dumps({"name": "weather", "arguments": arguments})
        replica.text = f"<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{call}\n</tool_call>"
        for body in ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {}):
            status, answer = ask(**body)
            choice, (_, chunks) = answer["choices"][0], ask(**body, stream=True)
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            content = "".join(delta.get("content") or "" for delta in deltas)
            streamed = [one for delta in deltas for one in delta.get("tool_calls", ())]
            assert choice["message"]["reasoning_content"] == "Hm." and content == choice["message"]["content"]
            assert choice["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"]
            if "tool_choice" in body or not body:
                assert choice["finish_reason"] == "stop" and call in content and not streamed
                continue
            assert choice["finish_reason"] == "tool_calls" and content == "I look."
            for one in (*choice["message"]["tool_calls"], *streamed):
                assert one["function"]["name"] == "weather" and one["type"] == "function"
                assert json.loads(one["function"]["arguments"]) == arguments
            assert len(streamed) == 1 and streamed[0]["index"] == 0

        replica.text, replica.end = "ab", FAILED
        status, answer = ask()
        assert (status, answer["error"]["type"]) == (500, "server_error") and "not finite" in answer["error"]["message"]
        status, chunks = ask(stream=True)
        assert status == 200 and "not finite" in chunks[-1]["error"]["message"], "the head was sent before"

        replica.text, replica.end = "x" * 50, STOP
        replica.go.clear()
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            asked = [pool.submit(ask) for _ in range(10)]
            told = 10 - SLOTS - WAITING
            until("those that find no room are told so", lambda: sum(one.done() for one in asked) == told)
            backlog.close()
            assert ask()[0] == 503
            backlog.abort()
            statuses = sorted(one.result()[0] for one in asked)
        assert statuses == [429] * told + [503] * (10 - told)
    assert not replica.is_alive() and backlog.counts() == (0, 0)
