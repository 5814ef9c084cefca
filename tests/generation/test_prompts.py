"""Questions from files, and where replies end."""

import json
import math

import pytest
import tiny
from fuzz import JSON, edited, examples, ours_only
from hypothesis import given
from hypothesis import strategies as st

from megalora.errors import UserError
from megalora.generation.defaults import beginning, eos_token_ids, not_applied, sampling_defaults, unescaped
from megalora.generation.prompts import ask, encode, read_questions, stop_token_ids, unseen_stops


class Template:
    """Stands in for ChatTemplate: a token a character."""

    end_token_id = 9
    longest_token = 4
    stop_token_ids = (9, 3)

    def prompt(self, messages):
        if messages.messages[-1].content == "refused":
            raise UserError("the template refuses")
        return [ord(character) for message in messages.messages for character in message.content]


def messages(questions):
    return [[(m.role, m.content) for m in question.conversation.messages] for question in questions]


def test_a_text_file_has_one_a_line(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffhello\r\n\n  你是谁？ \n[not json".encode())
    questions = read_questions(file, None)
    assert [q.text for q in questions] == ["hello", "你是谁？", "[not json"]
    assert [q.where for q in questions] == [f"{file} line {n}" for n in (1, 3, 4)]
    assert messages(read_questions(file, "be brief"))[0] == [("system", "be brief"), ("user", "hello")]


ROWS = [
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"conversation": [{"system": "s", "input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
]


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_rows_end_before_their_last_reply(tmp_path, name):
    file = tmp_path / name
    file.write_text(json.dumps(ROWS) if name == "p.json" else "\n".join(map(json.dumps, ROWS)))
    questions = read_questions(file, None)
    assert messages(questions) == [
        [("user", "add\n1 2")],
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
        [("user", "q")],
    ]
    assert [q.text for q in questions] == ["add\n1 2", "c", "q"]
    with pytest.raises(UserError, match="row 1: has a system message of its own"):
        read_questions(file, "be brief")


def test_a_line_may_hold_other_separators(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("one\u2028two\x0cthree\nfour".encode())
    assert [q.text for q in read_questions(file, None)] == ["one\u2028two\x0cthree", "four"]


def test_stops_that_leave_no_text_are_token_ids():
    tokenizer = tiny.tokenizer()
    special = tokenizer.eos_token
    assert unseen_stops(tokenizer, ["who", special, "nowhere"]) == [tokenizer.convert_tokens_to_ids(special)]


def test_rows_need_no_reply(tmp_path):
    rows = [
        {"instruction": "add", "input": "1 2"},
        {"instruction": "add", "output": ""},
        {"conversation": [{"system": "s", "input": "a", "output": "b"}, {"input": "c"}]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
        {"conversations": [{"from": "human", "value": "q"}]},
        {"prompt": "p"},
        "p",
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert messages(read_questions(file, None)) == [
        [("user", "add\n1 2")],
        [("user", "add")],
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
        [("system", "s"), ("user", "q")],
        [("user", "q")],
        [("user", "p")],
        [("user", "p")],
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b" \n\n", r"p\.txt holds no prompts"),
        ("p.txt", b"one\ntwo \xff\n", r"p\.txt line 2: byte 8 is not UTF-8"),
        ("p.txt", None, r"p\.txt: cannot be read \(No such file"),
        ("p.json", b"[]", r"p\.json holds no rows"),
        ("p.jsonl", b'{"text": 1}', r"p\.jsonl row 0: .* no known shape"),
        ("p.jsonl", b'{"prompt": 1}', r"p\.jsonl row 0: instruction or input is a JSON number"),
        ("p.jsonl", b'{"messages": [{"role": "system", "content": "s"}]}', r"p\.jsonl row 0: roles in the wrong order"),
        ("p.jsonl", b'{"messages": []}', r"p\.jsonl row 0: messages is an empty list"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_questions(tmp_path / name, None)
    assert "\n" not in str(raised.value)


def test_bad_texts():
    with pytest.raises(UserError, match="prompt is empty"):
        ask(" ", None, "prompt")
    with pytest.raises(UserError, match="not UTF-8"):
        ask("caf\udce9", None, "prompt")  # what Python makes of a Latin-1 byte on the command line


def test_a_prompt_needs_room_for_a_reply():
    question = ask("12345", None, "prompt")
    assert len(encode(Template(), question, 6)) == 5
    with pytest.raises(UserError, match="prompt: 5 tokens leave no room for a reply in a context of 5"):
        encode(Template(), question, 5)
    with pytest.raises(UserError, match="prompt: 21 characters leave no room for a reply in a context of 5 tokens"):
        encode(Template(), ask("1" * 21, None, "prompt"), 5)
    with pytest.raises(UserError, match="^prompt: the template refuses"):
        encode(Template(), ask("refused", None, "prompt"), 50)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [4, 5]}, {"eos_token_id": 6}, (4, 5, 9)),
        ({"eos_token_id": 0}, {"eos_token_id": 6}, (0, 9)),
        ({"eos_token_id": None}, {"eos_token_id": 6}, (6, 9)),
        ({}, {}, (3, 9)),
        (None, {"eos_token_id": [9]}, (9,)),
        (None, None, (3, 9)),
    ],
)
def test_stops(tmp_path, generation, config, expected):
    for name, fields in (("generation_config.json", generation), ("config.json", config)):
        if fields is not None:
            (tmp_path / name).write_text(json.dumps(fields))
    assert stop_token_ids(tmp_path, Template()) == expected


def config(tmp_path, **fields):
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    return tmp_path


def test_sampling_that_the_model_asks_for(tmp_path):
    assert sampling_defaults(tmp_path) == {}
    asked = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
    assert sampling_defaults(config(tmp_path, do_sample=True, **asked, bos_token_id=1)) == asked
    assert sampling_defaults(config(tmp_path, **asked, repetition_penalty=1.05)) == {"repetition_penalty": 1.05}
    assert sampling_defaults(config(tmp_path, do_sample=True, temperature=None)) == {"temperature": 1.0}


SOUND = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
         "eos_token_id": [3, 9], "decoder_start_token_id": 1, "forced_bos_token_id": 2, "num_beams": 4}  # fmt: skip


@examples(60)
@given(data=st.data())
def test_any_generation_config(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    numbers = st.integers(-2, 3) | st.floats() | st.sampled_from([2**63, 10**400, -(10**400), True]) | JSON
    body = SOUND | data.draw(st.dictionaries(st.sampled_from(sorted(SOUND)), numbers, max_size=3))
    (folder / "generation_config.json").write_text(json.dumps(data.draw(st.just(body) | edited(body))))

    def read():
        asked, ids = sampling_defaults(folder), [*eos_token_ids(folder), *beginning(folder, 1, None, 500)]
        assert all(math.isfinite(float(value)) for value in asked.values()), asked
        assert all(-(2**31) < i < 2**31 for i in ids), ids
        not_applied(folder)

    ours_only(read)


def test_what_is_asked_for_and_not_applied_is_said(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}))
    said = "not applied in generation, though {} of the model asks for it: {}"
    beams = "num_beams 4, length_penalty 2.0, early_stopping True"
    assert not_applied(tmp_path) == said.format("config.json", beams)
    assert not_applied(config(tmp_path, num_beams=1, length_penalty=2.0, no_repeat_ngram_size=0)) is None
    name = "generation_config.json"
    assert not_applied(config(tmp_path, no_repeat_ngram_size=3)) == said.format(name, "no_repeat_ngram_size 3")


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", "hot"), ("top_p", 0), ("top_p", 2), ("top_k", 1.5), ("top_k", True),
     ("min_p", -0.1), ("repetition_penalty", 0), ("temperature", 1e999)],
)  # fmt: skip
def test_sampling_that_cannot_be(tmp_path, name, value):
    with pytest.raises(UserError, match=f"generation_config.json: {name} = .* is not valid: give"):
        sampling_defaults(config(tmp_path, **{name: value}))


@pytest.mark.parametrize(
    ("given", "meant"),
    [(r"\n", "\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), (r"\d\\", "\\d\\"), ("\n", "\n"), ("\\", "\\"), ("你", "你")],
)
def test_escapes(given, meant):
    assert unescaped(given) == meant


@pytest.mark.parametrize("text", ["[", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}'])
def test_a_bad_generation_config(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match="generation_config.json"):
        stop_token_ids(tmp_path, Template())
