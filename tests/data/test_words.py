"""Tokens of words that were seen before: those of the whole text, for every expression that is known to cut so."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from megalora.data import words
from megalora.data.words import KNOWN_CUTS, WordTokens, cuts_at_spaces

DEEPSEEK = [cut for cut in KNOWN_CUTS if r"\s+" not in cut or r"\p{P}" in cut]
CUTS = {
    "gpt2": [],
    "digits": ["digits"],
    "deepseek": sorted(DEEPSEEK, key=len),
    **{f"cut {number}": [cut] for number, cut in enumerate(sorted(KNOWN_CUTS - set(DEEPSEEK)))},
}
ADDED = ["<think>", "</think>", "<|im_end|>"]


def tokenizer(cuts, normalizer=None) -> Tokenizer:
    """A byte-level one with merges of many kinds, so that tokens change with where a text is cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "Ġ.abĊ 1" for b in "Ġ.abĊ'1" if a in alphabet and b in alphabet]
    merges = [*pairs, ("ĠĠ", "ĠĠ"), ("aa", "bb"), ("Ġa", "b"), ("ĊĊ", "Ċ")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    made = Tokenizer(models.BPE(vocabulary, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cuts in ([], ["digits"]))
    steps = [
        pre_tokenizers.Digits() if cut == "digits" else pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts
    ]
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_special_tokens([AddedToken(token) for token in ADDED])
    return made


TEXTS = st.lists(
    st.sampled_from(
        [*" \t\n\r\v\f\x1c\x85\xa0\u3000\u200b", " ", "  ", "a", "ab", "bb", ".", "...", "'s", "'", "1", "123", "好",
         "é", "e\u0301", "\u0301", "𝔸", "ǅ", "\x00", "<think>", "</think>", "<|im_end|>", "<|im"]
    ) | st.characters(exclude_categories=["Cs"]),
    max_size=24,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
@given(texts=st.lists(TEXTS, max_size=6))
@example(
    texts=["a\t  b", "a\n  b", "a  ", "  ", " a", "", "a.\n b", "a 's b", "1 234 5", "a\xa0 b", "<think> a </think>"]
)
def test_words_have_the_tokens_of_the_text(name, texts):
    made = tokenizer(CUTS[name], normalizers.NFC() if name != "gpt2" else None)
    assert cuts_at_spaces(made)
    known = WordTokens(made)
    expected = [one.ids for one in made.encode_batch_fast(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in known.ids(texts)] == expected
    assert [ids.tolist() for ids in known.ids(texts[::-1])] == expected[::-1], "all words are known now"


@pytest.mark.parametrize("name", CUTS)
def test_behind_any_character(name):
    """What white space is: no character before a space is cut from it where the tokenizer keeps both together."""
    made = tokenizer(CUTS[name])
    characters = [chr(code) for code in range(0x3100) if chr(code).isprintable() or chr(code).isspace() or code < 160]
    texts = [f"a{c} b{c}  {c} a" for c in characters]
    expected = [one.ids for one in made.encode_batch_fast(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in WordTokens(made).ids(texts)] == expected


def test_real_texts(r1):
    backend = r1.backend_tokenizer
    assert cuts_at_spaces(backend)
    texts = Path(__file__).read_text(encoding="utf-8").split("\n\n")
    texts += ["你是谁？ 我是 Mega。\n\n  x = 1\n", "I'LL say it's 12,345.67 €  \t\n", "<think>\n1 + 1\n</think>\n\n2"]
    expected = [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]
    known = WordTokens(backend)
    for _ in range(2):
        assert [ids.tolist() for ids in known.ids(texts)] == expected


def changed(made, **parts):
    for name, value in parts.items():
        setattr(made, name, value)
    return made


def with_added(**flags):
    made = tokenizer([])
    made.add_tokens([AddedToken(flags.pop("content", "<x>"), **flags)])
    return made


def byte_level(**flags):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **flags})


@pytest.mark.parametrize(
    "made",
    [
        lambda: changed(tokenizer([]), pre_tokenizer=pre_tokenizers.Metaspace()),
        lambda: changed(tokenizer([]), pre_tokenizer=pre_tokenizers.Whitespace()),
        lambda: changed(tokenizer([]), pre_tokenizer=byte_level(add_prefix_space=True)),
        lambda: changed(tokenizer([]), pre_tokenizer=byte_level(use_regex=False)),
        lambda: tokenizer([r"\w+ \w+"]),
        lambda: tokenizer([r"\p{N}{1,3}"]),
        lambda: Tokenizer(models.BPE()),
        lambda: changed(tokenizer([]), normalizer=normalizers.NFKC()),
        lambda: changed(tokenizer([]), normalizer=normalizers.Prepend("x")),
        lambda: changed(tokenizer([]), model=models.WordLevel({"a": 0}, "a")),
        lambda: with_added(lstrip=True),
        lambda: with_added(rstrip=True),
        lambda: with_added(single_word=True),
        lambda: with_added(content="a b"),
    ],
)
def test_others_are_left_alone(made):
    assert not cuts_at_spaces(made())


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(words, "_MOST_WORDS", 50)
    made = tokenizer([])
    known = WordTokens(made)
    for start in range(0, 300, 30):
        texts = [f"a{number} {'b' * 100}{number}" for number in range(start, start + 30)]
        expected = [one.ids for one in made.encode_batch_fast(texts, add_special_tokens=False)]
        assert [ids.tolist() for ids in known.ids(texts)] == expected
        assert len(known._known) <= 50 and all(len(word) <= 48 for word in known._known)
    assert not pickle.loads(pickle.dumps(known))._known
