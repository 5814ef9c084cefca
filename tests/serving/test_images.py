"""`megalora serve` of a model that reads images: replies are those of `megalora generate` with the same files, and what
is no image and text is refused in a line."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import random

import pytest
import tiny
from browser import browser
from pictured import ASKED, COLOURS, make_adapter, make_model, make_rows
from PIL import Image
from server import started
from talking import rows, run
from told import user_error

from megalora import cli
from megalora.serving import images as serving_images
from megalora.serving.errors import ApiError
from megalora.serving.images import ImageInput

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it
MODELS, NEW, IMAGES = ["base", "tuned", "other"], 12, 4
LONG = " ".join(["and which colour is it then"] * 3)  # a second question about an image begins with what a slot holds
QUESTIONS = [ASKED, f"{LONG} here", f"{LONG} there", ""]


def data_url(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def part(url: str, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def asked(url: str, text: str = ASKED, model: str = "base", **more) -> dict:
    content = [part(url), *([{"type": "text", "text": text}] if text else [])]
    return {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": NEW, "temperature": 0,
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(model, {name: adapter}, the URL of each image, {name: replies of `megalora generate`, image by image})."""
    folder = tmp_path_factory.mktemp("pictured")
    model, file = make_model("opt", folder / "model"), make_rows(folder)
    adapters = {name: folder / name for name in MODELS[1:]}
    for seed, where in enumerate(adapters.values()):
        make_adapter("opt", model, where, seed)
    named = [row["image"] for row in json.loads(file.read_text())[:IMAGES]]
    pairs = [{"image": image} | ({"prompt": text} if text else {}) for image in named for text in QUESTIONS]
    questions, expected = tiny.write_json(folder / "questions.json", pairs), {}
    for name in MODELS:
        out = folder / f"{name}.jsonl"
        adapter = ["--resume_peft_from_checkpoint", adapters[name]] if name in adapters else []
        words = ["--model_path", model, "--prompts_file", questions, "--output_file", out, "--max_new_tokens", NEW]
        assert run(0, 1, [str(word) for word in (*words, "--dtype", "float32", *adapter)]) == [""]
        expected[name] = [row["response"] for row in rows(out)]
    assert all(len(set(replies[0::4])) > 1 and len(set(replies)) > IMAGES for replies in expected.values())
    assert len({tuple(replies) for replies in expected.values()}) == len(MODELS)
    return model, adapters, [data_url((folder / image).read_bytes()) for image in named], expected


def words(case, *more):
    model, adapters, *_ = case
    named = [f"{name}={folder}" for name, folder in adapters.items()]
    return ["serve", "--model_path", model, "--model_name", "base", "--adapters", *named, "--port", 0, *more]


@pytest.fixture(scope="module")
def server(case):
    with started(*words(case, "--max_running", 3, "--seq_length", 200)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def replies_of_all(client, case, streams=(False, True)):
    """Every image, question and model at once, whole and streamed, are replied to as by `megalora generate`."""
    _, _, urls, expected = case
    places = [(image, number) for image in range(IMAGES) for number in range(len(QUESTIONS))]
    wanted = [(*place, model, stream) for place in places for model in MODELS for stream in streams]
    random.Random(1).shuffle(wanted)

    def reply(one):
        image, number, model, stream = one
        answer = client.chat.completions.create(**asked(urls[image], QUESTIONS[number], model), stream=stream)
        if not stream:
            return answer.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reply, wanted))
    assert found == [expected[model][image * len(QUESTIONS) + number] for image, number, model, _ in wanted]


def test_replies_are_those_of_generate(client, case):
    replies_of_all(client, case)


def test_one_image_after_another(client, case):
    """Each in the slot of the one before, whose keys are of the same words."""
    for image, url in enumerate(case[2]):
        for number in (1, 2):
            answer = client.chat.completions.create(**asked(url, QUESTIONS[number]))
            assert answer.choices[0].message.content == case[3]["base"][image * len(QUESTIONS) + number]


def test_models_and_usage(client, case, server):
    listed = server.ask("/v1/models")[1]["data"]
    assert [one["input_modalities"] for one in listed] == [["text", "image"]] * len(MODELS)
    url = case[2][0]
    few = client.chat.completions.create(**asked(url, "", n=2))
    assert few.usage.prompt_tokens >= 4 and len(few.choices) == 2
    more = client.chat.completions.create(**asked(url, ASKED))
    assert more.usage.prompt_tokens > few.usage.prompt_tokens
    text_first = asked(url)
    text_first["messages"][0]["content"].reverse()  # it stands behind the image all the same
    text_first["messages"][0]["content"].append({"type": "text", "text": ""})
    assert client.chat.completions.create(**text_first).choices == more.choices


def test_kinds_of_images(client, case):
    """The same pixels in other files, also where the URL names another kind: the contents say it."""
    data = base64.b64decode(case[2][0].partition(",")[2])
    image, said = Image.open(io.BytesIO(data)), set()
    for kind, media, more in (("GIF", "gif", {}), ("WEBP", "webp", {"lossless": True}), ("PNG", "jpeg", {})):
        file = io.BytesIO()
        (image.quantize(256) if kind == "GIF" else image).save(file, kind, **more)
        url = data_url(file.getvalue(), f"image/{media}")
        said.add(client.chat.completions.create(**asked(url.replace("data:", "DATA:"))).choices[0].message.content)
    assert said == {case[3]["base"][0]}


PNG = io.BytesIO()
Image.new("RGB", (40, 30), COLOURS["red"]).save(PNG, "PNG")
URL = data_url(PNG.getvalue())
BMP = io.BytesIO()
Image.new("RGB", (4, 3)).save(BMP, "BMP")
BOMB = io.BytesIO()
Image.new("1", (6000, 6000)).save(BOMB, "PNG")
BAD = [
    (asked("https://example.com/a.png"), "fetches nothing and reads no files; send the image itself as a data URL"),
    (asked("file:///etc/passwd"), "fetches nothing and reads no files"),
    (asked("/etc/passwd"), "fetches nothing and reads no files"),
    (asked("data:"), "says '' before its data"),
    (asked(data_url(PNG.getvalue(), "text/plain")), "says 'text/plain;base64' before its data: send one of image/gif"),
    (asked("data:image/png,abc"), "is not in base64"),
    (asked("data:image/png;base64,ab$c"), "is not base64"),
    (asked("data:image/png;base64,abc"), "is not base64"),
    (asked("data:image/png;base64,"), "the image: is not an image that can be read"),
    (asked(URL[:-40]), "is not an image that can be read"),
    (asked(data_url(b"GIF89a" + b"\xff" * 300, "image/gif")), "is not an image that can be read"),
    (asked(data_url(BMP.getvalue())), "is not an image that can be read (UnidentifiedImageError): give a file of GIF"),
    (asked(data_url(BOMB.getvalue())), "has 6000 x 6000 pixels, more than 33,554,432: scale it down"),
    (asked(URL, "a <image> b"), "has <image> in its text"),
    (asked(URL, "word " * 300), "leave no room for a reply"),
    (asked(URL, chat_template_kwargs={"x": 1}), "does not read x"),
    (asked(URL) | {"messages": []}, "messages is empty or missing"),
    (asked(URL) | {"messages": [{"role": "user", "content": ASKED}]}, "has no image, and this model reads one before"),
    (asked(URL) | {"messages": asked(URL)["messages"] * 2}, "does not chat: send one message of the user alone"),
    (asked(URL) | {"messages": [{"role": "system", "content": "x"}, *asked(URL)["messages"]]}, "does not chat"),
    (asked(URL) | {"messages": [{"role": "user", "content": [part(URL)] * 2}]}, "has 2 images, and this model"),
    (asked(URL) | {"messages": [{"role": "user", "content": [part(URL, detail="low")]}]}, "'detail' beside the url"),
    (asked(URL) | {"messages": [{"role": "user", "content": [part(URL) | {"x": 1}]}]}, "is not written as"),
    (asked(URL) | {"messages": [{"role": "user", "content": [part(URL) | {"image_url": URL}]}]}, "is not written as"),
    (asked(URL) | {"messages": [{"role": "user", "content": [part(URL)], "weight": 1}]}, "messages[0] has 'weight'"),
    (
        asked(URL) | {"messages": [{"role": "user", "content": [part(URL), {"type": "input_audio"}]}]},
        "a part of type 'input_audio': this server reads text and one image_url",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_mistakes(server, number):
    body, told = BAD[number]
    status, answer, _ = server.ask("/v1/chat/completions", body)
    assert (status, answer["error"]["type"], answer["error"]["param"]) == (400, "invalid_request_error", "messages")
    assert told in answer["error"]["message"] and len(answer["error"]["message"]) < 400, answer


def test_mistakes_elsewhere(server):
    status, answer, _ = server.ask("/v1/completions", {"model": "base", "prompt": ASKED})
    assert status == 400 and "use /v1/chat/completions" in answer["error"]["message"]
    automatic = asked(URL) | {"messages": [{"role": "user", "content": [part(URL, detail="auto")]}]}
    assert server.ask("/v1/chat/completions", automatic)[0] == 200
    assert server.ask("/v1/chat/completions", asked(data_url(b" " * (8 << 20))))[0] == 413


def test_pixels_are_read_within_bounds(monkeypatch):
    """The largest image that a request may have is decoded; a bomb is refused by its header."""
    monkeypatch.setattr(serving_images, "MOST_PIXELS", 40 * 30)

    class Reader:
        pixels = staticmethod(lambda image, name: image.size)

    prefix = type("Prefix", (), {"tokens": 4, "placeholder": 7})
    one = ImageInput(prefix, Reader())
    assert one.read(URL).pixels == (40, 30) and one.placeholders == [7] * 4
    monkeypatch.setattr(serving_images, "MOST_PIXELS", 40 * 30 - 1)
    with pytest.raises(ApiError, match="has 40 x 30 pixels, more than 1,199"):
        one.read(URL)


GIVE = """((data, type, event) => {
  const items = new DataTransfer();
  items.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], "photo", { type }));
  if (event === "paste") document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: items }));
  else { $("file").files = items.files; $("file").dispatchEvent(new Event("change")); }
})"""


@pytest.mark.parametrize("width", [1000, 390])
def test_the_chat_page(server, case, tmp_path, width):
    """An image that is chosen or pasted goes with each message until it is removed; there is no dialogue."""
    urls, expected = case[2], case[3]
    data = [url.partition(",")[2] for url in urls]

    def say(text, turns):
        page.run(f"$('message').value = '{text}', $('send').click()")
        page.wait(f"document.querySelectorAll('.turn[data-done]').length === {turns} && $('stop').hidden")
        return page.run("[...document.querySelectorAll('.answer')].at(-1).textContent")

    with browser(tmp_path / "profile") as page:
        page.screen(width, 800)
        page.open(f"http://127.0.0.1:{server.port}/")
        page.wait("document.querySelectorAll('.pane').length > 0")
        page.run(f"$('temperature').value = 0, $('max_tokens').value = {NEW}")
        page.run("if ($('compare').checked) $('compare').click()")
        page.run(f"$('message').value = '{ASKED}', $('send').click()")
        assert page.run("$('about').textContent").startswith("Attach an image first")
        page.run(f"{GIVE}('{data[0]}', 'image/bmp', 'choose')")
        page.wait("$('about').textContent.includes('no GIF, JPEG, PNG or WEBP')")
        page.run(f"{GIVE}('{data[0]}', 'image/png', 'choose')")
        page.wait("$('thumbnail').complete && $('thumbnail').naturalWidth > 0")
        assert say(ASKED, 1) == expected["other"][0]
        assert say(QUESTIONS[1], 2) == expected["other"][1], "the image stays, and what was said before does not"
        page.run(f"{GIVE}('{data[1]}', 'image/png', 'paste')")
        page.wait(f"$('thumbnail').src.endsWith('{data[1][-40:]}')")
        assert say("", 3) == expected["other"][len(QUESTIONS) + 3]
        shown = page.run("[...document.querySelectorAll('.turn.user img')].map((one) => one.src)")
        assert shown == [urls[0], urls[0], urls[1]]
        assert page.run("document.documentElement.scrollWidth") <= width and page.run("$('send').offsetParent !== null")
        page.run("$('detach').click()")
        assert page.run("$('thumbnail').hidden && $('system').offsetParent === null")
        assert page.errors == []


def test_what_cannot_be_served(case, capsys, tmp_path):
    words, other = ["serve", "--port", "0", "--model_path"], make_model("t5", tmp_path / "t5")
    capsys.readouterr()
    assert cli.main([*words, str(other)]) == 2
    assert "blip-2 is an encoder-decoder, which serve does not answer with" in user_error(capsys.readouterr().err)
    assert cli.main([*words, str(case[0]), "--seq_length", "5"]) == 2
    assert "seq_length (5) leaves no room for a text: an image takes 4" in user_error(capsys.readouterr().err)


@pytest.mark.slow
def test_several_processes(case):
    layout = ["--nproc", 4, "--tensor_parallel_size", 2, "--pipeline_parallel_size", 2, "--max_running", 3]
    with started(*words(case, *layout, "--seq_length", 200)) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
        replies_of_all(client, case, streams=(False,))
        status, answer, _ = server.ask("/v1/chat/completions", BAD[0][0])
        assert status == 400 and "fetches nothing" in answer["error"]["message"]
