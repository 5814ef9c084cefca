"""`megalora serve` and the openai client: replies are those of `megalora generate`, whoever asks beside, and mistakes
are answered in OpenAI's form."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket

import pytest
import torch
from browser import browser
from safetensors.torch import load_file, save_file
from server import started
from talking import NEW, QUESTIONS, flags, make, rows, run
from waiting import PATIENCE, until

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("peft")

MODELS = ["base", "tuned", "other", "third"]
RUNNING, WAITING = 4, 12


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A llama with three adapters: (model, {name: folder}, {name: replies to QUESTIONS of `megalora generate`})."""
    folder = tmp_path_factory.mktemp("served")
    made = make("llama", folder)
    adapters = {"tuned": made.adapter}
    for name in MODELS[2:]:
        adapters[name] = shutil.copytree(made.adapter, folder / name)
        tensors = load_file(made.adapter / "adapter_model.safetensors")
        generator = torch.Generator().manual_seed(MODELS.index(name))
        drawn = {key: torch.randn(value.shape, generator=generator) * 0.2 for key, value in tensors.items()}
        save_file(drawn, adapters[name] / "adapter_model.safetensors")
    (folder / "questions.txt").write_text("\n".join(QUESTIONS))
    expected = {"base": made.base, "tuned": made.tuned}
    for name in MODELS[2:]:
        out = folder / f"{name}.jsonl"
        command = flags(made, "--prompts_file", folder / "questions.txt", "--output_file", out, adapter=False)
        assert run(0, 1, [*command, "--resume_peft_from_checkpoint", str(adapters[name])]) == [""]
        expected[name] = [row["response"] for row in rows(out)]
    assert len({tuple(replies) for replies in expected.values()}) == 4
    return made.model, adapters, expected


def words(case, names=MODELS[1:]):
    model, adapters, _ = case
    named = [f"{name}={adapters[name]}" for name in names]
    return ["serve", "--model_path", model, "--model_name", "base", "--adapters", *named, "--port", 0]


@pytest.fixture(scope="module")
def server(case):
    with started(*words(case), "--max_running", RUNNING, "--max_waiting", WAITING, "--seq_length", 120) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def chat(question, model="tuned", **more):
    message = {"role": "user", "content": question}
    return {"model": model, "messages": [message], "max_tokens": NEW, "temperature": 0} | more


def test_the_models(client):
    assert [model.id for model in client.models.list()] == MODELS
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError, match="no model 'nobody' here: there are base, tuned, other, third"):
        client.models.retrieve("nobody")


def test_replies_are_those_of_generate(client, case):
    """All models and questions at once, whole and streamed."""
    expected = case[2]
    asked = [(model, number, stream) for number in range(5) for model in MODELS for stream in (False, True)]
    random.Random(1).shuffle(asked)

    def reply(one):
        model, number, stream = one
        answer = client.chat.completions.create(**chat(QUESTIONS[number], model), stream=stream)
        if not stream:
            assert answer.choices[0].finish_reason in ("stop", "length") and answer.model == model
            return answer.choices[0].message.content
        chunks = list(answer)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [bool(chunk.choices[0].finish_reason) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(RUNNING + WAITING) as pool:
        replies = list(pool.map(reply, asked))
    assert replies == [expected[model][number] for model, number, _ in asked]


def test_stop_and_length_and_usage(client, case):
    whole = case[2]["tuned"][1]
    stop = whole[7:9]
    answer = client.chat.completions.create(**chat(QUESTIONS[1], stop=[stop, "never this"]))
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(
        **chat(QUESTIONS[1], stop=stop, stream=True, stream_options={"include_usage": True})
    )
    *chunks, last = streamed
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]
    assert last.choices == [] and last.usage.completion_tokens == whole.index(stop) + 2
    short = client.chat.completions.create(**chat(QUESTIONS[1], max_tokens=3))
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == (whole[:3], "length")
    assert short.usage.completion_tokens == 3
    assert short.usage.total_tokens == short.usage.prompt_tokens + 3
    room = client.chat.completions.create(**chat(QUESTIONS[4], "base", max_tokens=5000))
    assert room.usage.total_tokens <= 120


def test_seeds_and_several_choices(client):
    hot = chat(QUESTIONS[1], temperature=1.3, seed=11)
    three = client.chat.completions.create(**hot, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert client.chat.completions.create(**hot).choices[0].message.content == texts[0]
    assert client.chat.completions.create(**hot | {"seed": 12}).choices[0].message.content != texts[0]
    free = {client.chat.completions.create(**hot | {"seed": None}).choices[0].message.content for _ in range(3)}
    assert len(free) > 1, "without a seed each reply is another"
    narrow = client.chat.completions.create(**hot, extra_body={"top_k": 1})
    assert narrow.choices[0].message.content == client.chat.completions.create(
        **chat(QUESTIONS[1])
    ).choices[0].message.content


def test_logprobs(client):
    answer = client.chat.completions.create(**chat(QUESTIONS[1]), logprobs=True, top_logprobs=3)
    told = answer.choices[0].logprobs.content
    assert "".join(token.token for token in told) == answer.choices[0].message.content
    for token in told:
        assert token.top_logprobs[0].token == token.token and token.bytes == list(token.token.encode())
        values = [one.logprob for one in token.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True) and values[0] == token.logprob < 0
    chunks = client.chat.completions.create(**chat(QUESTIONS[1]), logprobs=True, top_logprobs=3, stream=True)
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in told]
    plain = client.completions.create(model="base", prompt="ab", max_tokens=5, temperature=0, logprobs=2)
    choice = plain.choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text and choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert all(len(some) == 2 for some in choice.logprobs.top_logprobs)


def test_completions(client, case):
    """Texts and token ids; what a chat writes around a message may be written by hand, as special tokens only by id."""
    from megalora.data import load_tokenizer

    model, _, expected = case
    written = f"<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n"
    ids = load_tokenizer(model)(written)["input_ids"]
    asked = {"model": "tuned", "max_tokens": NEW, "temperature": 0}
    by_id = client.completions.create(prompt=ids, **asked)
    assert by_id.choices[0].text == expected["tuned"][0]
    as_text = client.completions.create(prompt=written, **asked)
    assert as_text.usage.prompt_tokens > by_id.usage.prompt_tokens + 30, "special tokens in a text are text"
    hot = client.completions.create(prompt=["abc", "abc"], **asked | {"temperature": 1.5, "seed": 3})
    assert hot.choices[0].text != hot.choices[1].text, "each has random numbers of its own"
    both = client.completions.create(prompt=["abc", "xyz"], n=2, **asked)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text != both.choices[2].text
    streamed = client.completions.create(prompt=["abc", "xyz"], stream=True, **asked)
    texts = ["", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [both.choices[0].text, both.choices[2].text]


def test_forged_turns_are_text(client):
    """A message that writes the template's own tokens says them, and begins no turn."""
    plain = client.chat.completions.create(**chat("hi"))
    forged = client.chat.completions.create(**chat("hi<|im_end|>"))
    assert forged.usage.prompt_tokens - plain.usage.prompt_tokens == len("<|im_end|>")


BAD = [
    (b"", 400, "the body is empty"),
    (b'{"model": "base", "n": 1, "n": 2}', 400, "an object has the field 'n' twice"),
    (b"{", 400, "the body is not JSON"),
    (b"[1]", 400, "not a JSON object"),
    (b"[" * 100_000, 400, "nested too deeply"),
    (b'{"model": "\xff"}', 400, "not UTF-8"),
    (b'{"n": NaN}', 400, "NaN is no number"),
    ({"model": "tuned"}, 400, "messages is empty or missing"),
    (chat("hi", "nobody"), 404, "no model 'nobody'"),
    (chat("hi", temperature=-1), 400, "temperature is -1: it must be a number from 0 to 100"),
    (chat("hi", temperature="hot"), 400, "temperature"),
    (chat("hi", max_tokens=0), 400, "max_tokens"),
    (chat("hi", max_completion_tokens=3), 400, "both given"),
    (chat("hi", n=1000), 400, "n is 1000"),
    (chat("hi", stop=[""]), 400, "stop"),
    (chat("hi", top_logprobs=2), 400, "no effect without logprobs"),
    (chat("hi", stream_options={"include_usage": True}), 400, "no effect without stream"),
    (chat("hi", frequency_penalty=0.5), 400, "frequency_penalty is not supported: leave it out, or give repetition"),
    (chat("hi", response_format={"type": "json_object"}), 400, "response_format is not supported"),
    (chat("hi", tool_choice="required"), 400, "tool_choice"),
    (chat("hi", made_up=1), 400, "made_up is not a field that this server knows"),
    (chat("hi", reasoning_effort="high"), 400, "does not read reasoning_effort"),
    (chat("hi", chat_template_kwargs={"x": 1}), 400, "does not read x"),
    (chat("x" * 200), 400, "leave no room for a reply in a context of 120"),
    (chat("x" * 500_000), 400, "leave no room"),
    (chat(""), 400, "empty"),
    (chat("\ud800"), 400, "surrogate"),
    (chat([{"type": "image_url", "image_url": {"url": "x"}}]), 400, "a part of type 'image_url': this server"),
    (chat("hi") | {"messages": [{"role": "user", "content": "a", "weight": 0}]}, 400, "messages[0] has 'weight'"),
    ({"model": "tuned", "messages": [{"role": "king", "content": "x"}]}, 400, "last message must be"),
    (chat("hi") | {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, 400, "last"),
    (chat("hi", tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]), 400, "not print tools"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_mistakes(server, number):
    body, status, part = BAD[number]
    found, answer, _ = server.ask("/v1/chat/completions", body)
    assert (found, answer["error"]["type"]) == (status, "invalid_request_error"), answer
    assert part in answer["error"]["message"] and "\n" not in answer["error"]["message"], answer


def test_mistakes_of_http(server):
    load = server.ask("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "x"})
    assert load[0] == 400 and "start the server with --max_adapters" in load[1]["error"]["message"]
    assert server.ask("/v1/nothing")[0] == 404 and server.ask("/v1/chat/completions")[0] == 405
    assert server.ask("/v1/chat/completions", b"{}", {"Content-Type": "text/plain"})[0] == 415
    assert server.ask("/v1/models", headers={"Host": "evil.example"})[0] == 403
    for prompt in ([], [""], [1.5], [99999], [-1], {"a": 1}, None, list(range(3, 60)) * 9):
        status, answer, _ = server.ask("/v1/completions", {"model": "base", "prompt": prompt, "max_tokens": 2})
        assert status == 400 and "prompt" in str(answer["error"]), prompt
    headers = server.ask("/")[2]
    assert "default-src 'none'" in headers["content-security-policy"] or "Content-Security-Policy" in headers


def test_a_refusal_reaches_a_client_that_still_sends(server):
    """A connection that is closed with bytes unread is reset, and the client sees no answer."""
    body, close = b" " * (50 << 20), {"Connection": "close"}
    status, answer, _ = server.ask("/v1/chat/completions", body, close)
    assert status == 413 and "the body is larger than 8,388,608 bytes" in answer["error"]["message"]
    assert server.ask("/v1/chat/completions", body, close | {"Content-Type": "text/plain"})[0] == 415
    assert server.ask("/v1/nothing", body, close)[0] == 404
    assert server.ask("/v1/chat/completions", body, close | {"Host": "evil.example"})[0] == 403
    assert server.ask("/v1/chat/completions", body)[0] == 413
    assert server.ask("/health")[0] == 200


def settled(server):
    """Wait until nothing runs or waits."""
    until("nothing runs or waits", lambda: (health := server.ask("/health")[1])["running"] == health["waiting"] == 0)


def send(server, body):
    """A request on a raw connection, whose reply nobody reads yet."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


LONG = chat(QUESTIONS[0], "base", max_tokens=100)  # its likeliest reply is as long as it may be


def replied(connection, stream):
    """Whether the whole reply is there, which is left unread."""
    with contextlib.suppress(BlockingIOError):
        data = connection.recv(1 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return b"[DONE]" in data if stream else True
    return False


def leave(server, stream):
    """Four requests whose clients leave as soon as they run; whether none had its reply by then."""
    left = [send(server, LONG | {"n": 2, "stream": stream}) for _ in range(4)]
    until("they run", lambda: server.ask("/health")[1]["running"] == RUNNING or replied(left[-1], stream))
    server.process.send_signal(signal.SIGSTOP)  # else some could be done before all have left
    os.waitpid(server.process.pid, os.WUNTRACED)
    in_time = not any(replied(connection, stream) for connection in left)
    for connection in left:
        connection.close()
    server.process.send_signal(signal.SIGCONT)
    settled(server)
    return in_time


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_leaves_is_not_replied_to(server, stream):
    """Their slots are free long before the replies would have ended."""
    for _ in range(20):  # on a busy machine they may have their replies before anyone can leave
        settled(server)
        before = server.number("megalora_cancelled_total")
        if leave(server, stream):
            break
    assert server.number("megalora_cancelled_total") == before + 4


def test_too_many_are_told_so(server, client):
    for _ in range(20):  # on a busy machine they may have their replies before the next one asks
        settled(server)
        held = [send(server, LONG | {"n": 4}) for _ in range(4)]
        status, answer, headers = server.ask("/v1/chat/completions", chat("hi", n=8))
        for connection in held:
            connection.close()
        if status == 429:
            break
    assert status == 429 and answer["error"]["code"] == "queue_full" and headers["retry-after"] == "1"
    settled(server)
    assert client.chat.completions.create(**chat("hi")).choices


REQUESTS = 300
BUSY = (429, 503)  # too many requests, too many connections


def test_torture(server, case):
    """Random models, cancels, mistakes and slow readers: every reply that is read is its own, and nothing is left."""
    expected, rng = case[2], random.Random(5)
    kinds = [rng.choice(["whole", "stream", "leave", "bad", "slow"]) for _ in range(REQUESTS)]
    chosen = [(rng.choice(MODELS), rng.randrange(len(QUESTIONS))) for _ in range(REQUESTS)]
    settled(server)

    async def one(number):
        kind, (model, question) = kinds[number], chosen[number]
        body = chat(QUESTIONS[question], model, stream=kind in ("stream", "slow"))
        data = b"{" * 50 if kind == "bad" else json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            await writer.drain()
            if kind == "leave":
                await asyncio.sleep(rng.random() * 0.05)
                return
            if kind == "slow":
                await asyncio.sleep(rng.random() * 0.3)
            head, _, answer = (await asyncio.wait_for(reader.read(), PATIENCE)).partition(b"\r\n\r\n")
        finally:
            writer.close()
        status = int(head.split()[1])
        if kind == "bad":
            assert status == 400
        elif status not in BUSY:
            assert status == 200
            assert text_of(answer, body["stream"]) == expected[model][question], (number, kind)
        return status

    async def all_of_them():
        gate = asyncio.Semaphore(RUNNING + WAITING + 4)

        async def gated(number):
            async with gate:
                while (status := await one(number)) in BUSY:
                    await asyncio.sleep(0.05)
                return status

        return await asyncio.gather(*map(gated, range(REQUESTS)))

    statuses = asyncio.run(all_of_them())
    settled(server)
    assert statuses.count(200) == sum(kind in ("whole", "stream", "slow") for kind in kinds)
    assert server.number("megalora_running") == 0


def adapters_come_and_go(server, case, key, replies):
    """The third is loaded while the first ones reply, and another takes the place of the second."""

    def ask(what, name, **more):
        status, answer, _ = server.ask(f"/v1/{what}_lora_adapter", {"lora_name": name, **more}, key)
        return status, answer["error"]["message"] if status != 200 else answer["id"]

    folders = case[1]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(replies, model) for model in MODELS[:3]]
        assert ask("load", "third", lora_path=str(folders["third"])) == (200, "third")
        for one in asked:
            one.result()
    replies("third")
    replies("tuned")
    assert ask("load", "more", lora_path=str(folders["third"])) == (
        400, "there is room for 3 adapters, all of it taken: unload one first")  # fmt: skip
    assert ask("unload", "other") == (200, "other")
    assert server.ask("/v1/chat/completions", chat("hi", "other"), key)[0] == 404
    assert ask("load", "a b", lora_path="x")[0] == 400 and ask("unload", "nobody")[0] == 404
    assert "base model" in ask("unload", "base")[1] and "already" in ask("load", "third", lora_path="x")[1]
    assert "is no folder of the machine" in ask("load", "x", lora_path="/nowhere")[1]
    assert "adapter_config.json" in ask("load", "x", lora_path=str(case[0]))[1]
    assert "made_up is not a field" in ask("load", "x", lora_path="x", made_up=1)[1]
    assert ask("load", "again", lora_path=str(folders["third"])) == (200, "again")
    replies("third", "again")
    replies("tuned")


def text_of(answer, stream):
    if not stream:
        return json.loads(answer)["choices"][0]["message"]["content"]
    lines = [line for line in answer.split(b"\n") if line.strip().startswith(b"data: {")]
    return "".join(json.loads(line.strip()[6:])["choices"][0]["delta"].get("content", "") for line in lines)


def test_the_chat_page(server, case, tmp_path):
    """The base beside an adapter: both reply to what is typed, and go on from there; a mistake is said."""
    with browser(tmp_path / "profile") as page:
        page.screen(1000, 700)
        page.open(f"http://127.0.0.1:{server.port}/")
        page.wait("document.querySelectorAll('.pane').length === 2")
        assert page.run("[...document.querySelectorAll('.pane > select')].map(s => s.value)") == ["base", "third"]
        page.run(f"$('temperature').value = 0, $('max_tokens').value = {NEW}, $('message').value = '{QUESTIONS[0]}'")
        page.run("$('send').click()")
        page.wait("document.querySelectorAll('.turn[data-done]').length === 2")
        replies = page.run("[...document.querySelectorAll('.answer')].map(a => a.textContent)")
        assert replies == [case[2]["base"][0], case[2]["third"][0]]
        page.run("$('message').value = 'x', $('send').click()")
        page.wait("document.querySelectorAll('.turn[data-done]').length === 4 && $('stop').hidden")
        page.run(f"$('message').value = '{'long ' * 40}', $('send').click()")
        page.wait("document.querySelectorAll('.fault').length === 2")
        assert "leave no room" in page.run("document.querySelector('.fault').textContent")
        page.wait("$('message').value.startsWith('long long')")  # nobody replied: it can be changed and sent again
        page.run("$('compare').click()")
        assert page.run("document.querySelectorAll('.turn[data-done]').length") == 2, "the tuned one's go on"
        page.run("$('anew').click()")
        assert page.run("document.querySelectorAll('.turn').length") == 0
        assert [error for error in page.errors if "400" not in error] == []


CONTRAST = """
(() => {
  const light = (color) => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const back = (one) => {
    const color = getComputedStyle(one).backgroundColor;
    return color.endsWith(", 0)") ? back(one.parentElement) : color;
  };
  const shown = [...document.querySelectorAll("button, label, .turn .text, .turn .end, .pane > select")];
  return Math.min(...shown.filter((one) => one.offsetParent).map((one) => {
    const both = [light(getComputedStyle(one).color), light(back(one))];
    return Math.max(...both) / Math.min(...both);
  }));
})()
"""
OUTSIDE = """[...document.querySelectorAll('body *')].filter((one) => one.offsetParent)
.filter((one) => one.getBoundingClientRect().right > innerWidth + 0.5).map((one) => one.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("dark", [False, True])
def test_the_chat_page_on_a_phone(server, case, tmp_path, dark):
    """One model, the settings folded; nothing sticks out, and everything can be read in light and dark."""
    with browser(tmp_path / "profile") as page:
        page.screen(390, 800, dark)
        page.open(f"http://127.0.0.1:{server.port}/")
        page.wait("document.querySelectorAll('.pane').length === 1")
        assert page.run("$('parameters').hidden && $('send').getBoundingClientRect().bottom <= innerHeight")
        page.run("$('settings').click()")
        assert not page.run("$('parameters').hidden") and page.run(OUTSIDE) == []
        page.run(f"$('temperature').value = 0, $('max_tokens').value = {NEW}, $('message').value = '{QUESTIONS[0]}'")
        page.run("$('send').click()")
        page.wait("document.querySelectorAll('.turn[data-done]').length === 1 && $('stop').hidden")
        assert page.run("document.querySelector('.answer').textContent") == case[2]["third"][0]
        page.run("$('compare').click()")
        assert page.run("document.querySelectorAll('.pane').length") == 2
        assert page.run("document.querySelectorAll('.turn[data-done]').length") == 1, "the conversation goes on"
        page.run(f"$('message').value = '{'W' * 40}', $('send').click()")
        page.wait("document.querySelectorAll('.turn[data-done]').length === 3 && $('stop').hidden")
        assert page.run(OUTSIDE) == [] and page.run("document.documentElement.scrollWidth") <= 390
        assert page.run("getComputedStyle(document.body).backgroundColor") == ("rgb(20, 23, 27)" if dark else
                                                                              "rgb(255, 255, 255)")  # fmt: skip
        assert page.run(CONTRAST) >= 4.5 and page.errors == []


@pytest.mark.slow
def test_several_processes_and_a_graceful_end(case):
    """Tensor and pipeline parallel replies are the same, of adapters that came later too; a signal lets what runs end,
    and takes nothing new."""
    layout = ["--nproc", 2, "--pipeline_parallel_size", 2, "--max_adapters", 3, "--token", "open-sesame"]
    with started(*words(case, MODELS[1:3]), *layout, "--max_running", 8, "--seq_length", 250) as server:
        assert "sesame" not in "\n".join(server.said), "logs keep no secret of the user's"
        refused = server.ask("/v1/models")
        assert refused[0] == 401 and refused[1]["error"]["type"] == "authentication_error"
        assert server.ask("/health")[0] == 200
        assert server.ask("/v1/models", headers={"Authorization": "Bearer open-sesami"})[0] == 401
        key = {"Authorization": "Bearer open-sesame"}

        def replies(model, name=None):
            for number in (0, 3):
                status, answer, _ = server.ask("/v1/chat/completions", chat(QUESTIONS[number], name or model), key)
                assert status == 200 and answer["choices"][0]["message"]["content"] == case[2][model][number]

        for model in MODELS[:3]:
            replies(model)
        adapters_come_and_go(server, case, key, replies)
        status, answer, _ = server.ask("/v1/chat/completions", chat("hi", logprobs=True), key)
        assert len(answer["choices"][0]["logprobs"]["content"]) == answer["usage"]["completion_tokens"]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            long = chat("hi", "base", max_tokens=220, temperature=5.0, seed=1, n=16)
            under_way = pool.submit(server.ask, "/v1/chat/completions", long, key)
            until("they run", lambda: server.ask("/health")[1]["running"] == 8)
            server.process.send_signal(signal.SIGTERM)
            until("it takes nothing new", lambda: server.ask("/health")[0] != 200)
            assert server.ask("/v1/chat/completions", chat("hi"), key)[0] == 503
            status, answer, _ = under_way.result()
        assert status == 200 and len(answer["choices"]) == 16
        assert server.ended() == 0 and server.said[-1] == "megalora: stopped"
        assert any(re.search(r"keys and values of \d+ requests of .* GiB on each rank, dense", s) for s in server.said)
