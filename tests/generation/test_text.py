"""Text of replies while they come: in the end it is the text of the whole, and nothing is shown that is taken back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalora.generation.requests import INTERRUPTED, LENGTH, STOP, Prompt, Reply
from megalora.generation.text import Characters, Ear, Reader, Thinking, Until


class Bytes:
    """A tokenizer with a token a byte; 256 is special."""

    def get_vocab(self):
        return {"<|end|>": 256}

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        special = b"" if skip_special_tokens else b"<|end|>"
        return b"".join(special if i == 256 else bytes([i]) for i in ids).decode(errors="replace")


TEXTS = st.text(st.sampled_from("ab <>/think\n你🙂é"), max_size=30)
PROMPT = Prompt(0, list(b"user: hi"))


def ids(text):
    return list(text.encode())


def show(reader, prompt, token_ids, reason=LENGTH, **more):
    """What an Ear shows of a reply, and the verdicts that it gives."""
    shown, verdicts = [], []
    ear = Ear(reader, show=shown.extend, **more)
    for token in token_ids:
        verdicts.append(ear.hear(prompt, token))
        if verdicts[-1]:
            break
    ear.done(prompt, Reply(tuple(token_ids[: len(verdicts)]), reason))
    return shown, verdicts


@given(TEXTS, st.lists(st.integers(0, 256), max_size=12))
def test_characters_come_whole_and_all_of_them(text, noise):
    decode = Bytes().decode
    for token_ids in (ids(text), noise + ids(text), ids(text) + noise):
        characters = Characters(lambda part: decode(part, skip_special_tokens=True))
        pieces = [characters.add(token) for token in token_ids]
        assert "".join([*pieces, characters.rest()]) == decode(token_ids, skip_special_tokens=True)
        if not noise:
            assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte():
    characters = Characters(Bytes().decode)
    assert [characters.add(token) for token in ids("a你b")] == ["a", "", "", "你", "b"]


def test_a_real_tokenizer(tmp_path):
    """One that sets a space before the first word and takes it off again."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["\u2581hello", "\u2581world", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    token_ids = [0, 1, 2, *(3 + byte for byte in "你".encode()), 1]
    characters = Characters(backend.decode)
    assert [characters.add(token) for token in token_ids] == ["hello", " world", "!", "", "", "你", " world"]


def byte_fallback():
    """As sentencepiece: a character of no vocabulary is byte tokens, which become text together or not at all."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["\u2581hello", "\u2581world", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(tag, special=True) for tag in TAGS]})
    return tokenizer


TAGS = ["<think>", "</think>"]


def test_a_reply_cut_inside_a_character_loses_no_whole_one():
    tokenizer = byte_fallback()
    cut = [0, *(3 + byte for byte in "你好".encode()[:-1])]
    assert "你" not in tokenizer.decode(cut)  # which is what the library makes of it
    answer = Reader(tokenizer).answer(Reply(tuple(cut), LENGTH), Prompt(0, [1]))
    assert answer.text.startswith("hello你\ufffd")
    again = Reader(tokenizer).answer(Reply((*cut, 1), LENGTH), Prompt(0, [1]))
    assert again.text.startswith("hello你\ufffd") and again.text.endswith(" world")
    pieces, _ = show(Reader(tokenizer), Prompt(0, [1]), cut)
    assert "".join(piece.text for piece in pieces) == answer.text


def test_thinking_tags_that_are_special_tokens():
    tokenizer = byte_fallback()
    start, end = tokenizer.convert_tokens_to_ids(TAGS)
    assert tokenizer.decode([start, 0, end, 1], skip_special_tokens=True) == "hello world"
    answer = Reader(tokenizer).answer(Reply((start, 0, end, 1), STOP), Prompt(0, [1]))
    assert (answer.thinking, answer.text) == ("hello", "world")
    pieces, _ = show(Reader(tokenizer), Prompt(0, [1]), [start, 0, end, 1])
    assert [piece.thinking for piece in pieces if piece.text] == [True, False]


@given(TEXTS, st.lists(st.text("ab \n<", min_size=1, max_size=4), max_size=3), st.randoms())
def test_stop_strings_cut_where_the_first_begins(text, stops, random):
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    until, out = Until(stops), ""
    while text and not until.stopped:
        n = random.randint(1, 3)
        out, text = out + until.add(text[:n]), text[n:]
    whole = out + until.rest()
    assert until.stopped == bool(found)
    assert whole == (whole + text)[: len(whole)] and not any(stop in whole for stop in stops)


@settings(deadline=None)
@given(TEXTS, TEXTS, st.sampled_from(["", "<think>", " \n<think>"]), st.sampled_from(["", "</think>"]), st.randoms())
def test_pieces_make_the_answer(before, after, opening, closing, random):
    """However the text is cut into pieces; with the prompt's own <think> or without."""
    text = opening + before + closing + after
    for inside in (False, True):
        whole = Thinking(inside)
        expected = [*whole.add(text), *whole.rest()]
        thinking, pieces, rest = Thinking(inside), [], text
        while rest:
            n = random.randint(1, 4)
            pieces, rest = pieces + thinking.add(rest[:n]), rest[n:]
        pieces += thinking.rest()
        for kind in (True, False):
            parts = ["".join(piece.text for piece in one if piece.thinking == kind) for one in (expected, pieces)]
            assert parts[0] == parts[1]


@pytest.mark.parametrize(
    ("prompt", "text", "thinking", "answer"),
    [
        ("hi", "plain <think>x</think>", None, "plain <think>x</think>"),
        ("hi", " as it is ", None, " as it is "),
        ("hi", "<think>\nso\n</think>\n\nyes\n", "so", "yes\n"),
        ("hi", "\n<think>cut off", "cut off", ""),
        ("hi", "<thin", None, "<thin"),
        ("hi", " \n", None, " \n"),
        ("hi", "\n<thin", None, "\n<thin"),
        ("hi<think>\n", "so\n</think>\n\nyes", "so", "yes"),
        ("hi<think>\n", "\n</think>yes", None, "yes"),
    ],
)
def test_thinking_stands_apart(prompt, text, thinking, answer):
    reader, prompt = Reader(Bytes()), Prompt(0, ids(prompt))
    found = reader.answer(Reply(tuple(ids(text)), STOP), prompt)
    assert (found.thinking, found.text, found.whole, found.finish_reason) == (thinking, answer, text, STOP)
    pieces, _ = show(reader, prompt, ids(text))
    assert "".join(p.text for p in pieces if p.thinking) == (thinking or "")
    assert "".join(p.text for p in pieces if not p.thinking) == answer


@pytest.mark.parametrize(
    "prompt, text, unfinished",
    [("q<think>\n", "so", True), ("q", "<think>so", True), ("q", "<think>so</think>yes", False), ("q", "yes", False)],
)
def test_thinking_that_never_ends(prompt, text, unfinished):
    answer = Reader(Bytes()).answer(Reply(tuple(ids(text)), LENGTH), Prompt(0, ids(prompt)))
    assert answer.unfinished == unfinished == (answer.remark is not None)
    assert answer.closed == (f"{text}\n</think>\n\n" if unfinished else text)


def test_an_ear_ends_replies():
    reader = Reader(Bytes(), ["\n\n", "END"])
    pieces, verdicts = show(reader, PROMPT, ids("one\nEN two END three"))
    assert verdicts[-1] == STOP and set(verdicts[:-1]) == {None} and len(verdicts) == len("one\nEN two END")
    assert "".join(piece.text for piece in pieces) == "one\nEN two "
    assert reader.answer(Reply(tuple(ids("one\nEN two END")), STOP), PROMPT).text == "one\nEN two "
    asked = iter([False, False, True])
    pieces, verdicts = show(Reader(Bytes()), PROMPT, ids("abcdef"), interrupted=lambda: next(asked))
    assert verdicts == [None, None, INTERRUPTED] and "".join(piece.text for piece in pieces) == "abc"


def test_replies_do_not_mix():
    kept = []
    ear = Ear(Reader(Bytes(), ["XY"]), finished=lambda prompt, reply: kept.append((prompt.number, reply)))
    other, reply = Prompt(1, PROMPT.token_ids), Reply((1,), LENGTH)
    assert ear.hear(PROMPT, ord("X")) is ear.hear(other, ord("Y")) is None
    ear.done(other, reply)
    assert ear.hear(other, ord("Y")) is None and ear.hear(PROMPT, ord("Y")) == STOP
    assert kept == [(1, reply)]
