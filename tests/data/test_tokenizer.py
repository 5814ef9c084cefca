"""A tokenizer gives the tokens of its own file, and nothing of its folder is ever run."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megalora.data.pieces import PieceTokenizer, Segment
from megalora.data.tokenizer import PROBES, new_tokens, open_tokenizer
from megalora.errors import UserError
from megalora.tokenizer_files import read_template, write_tokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level() -> Tokenizer:
    """As GPT-2's and Qwen's files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *alphabet, "\u0120b", "\u010a\u010a"])}
    backend = Tokenizer(models.BPE(vocabulary, [("\u0120", "b"), ("\u010a", "\u010a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    return backend


def byte_level_by_digits() -> Tokenizer:
    """As DeepSeek's: cut differently than any class of transformers cuts by itself."""
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return backend


def like_sentencepiece() -> Tokenizer:
    """As Llama 2's tokenizer.json."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581b"]
    backend = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, [("\u2581", "b")], unk_token="<unk>", byte_fallback=True,
            fuse_unk=True,
        )
    )  # fmt: skip
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def folder_of(folder, backend, model_type=None, **config):
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES | config))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", None])
@pytest.mark.parametrize(
    "name",
    ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", "CodeLlamaTokenizerFast", None],
)
@pytest.mark.parametrize("backend", [byte_level, byte_level_by_digits, like_sentencepiece])
def test_tokens_are_those_of_the_file(tmp_path, backend, name, model_type):
    """Whatever class the folder names, for whatever model: transformers gives some of these other tokens."""
    own = backend()
    folder = folder_of(tmp_path, own, model_type, **({} if name is None else {"tokenizer_class": name}))
    opened = open_tokenizer(folder)
    for text in (*PROBES, "<s>a b</s> <unk>\n"):
        assert (
            opened.tokenizer(text, add_special_tokens=False)["input_ids"]
            == own.encode(text, add_special_tokens=False).ids
        )
    assert opened.tokenizer.eos_token == "</s>"


OPTIONS = [{"legacy": True}, {"legacy": False, "add_prefix_space": False}, {"add_prefix_space": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize("backend", [byte_level, byte_level_by_digits, like_sentencepiece])
def test_flags_of_the_config_and_added_tokens(tmp_path, backend, name, options):
    """Flags that older files carry, and tokens that were added in several ways; then new ones are added here."""
    own = backend()
    own.add_special_tokens([AddedToken("<|strip|>", lstrip=True, rstrip=True), AddedToken("<|im_end|>")])
    own.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("ab", single_word=True)])
    folder = folder_of(tmp_path, own, "llama", tokenizer_class=name, **options)
    texts = (*PROBES, "a <|strip|> b", "<tool>a<|im_end|>", " <tool> ab b", "abb ab", "<new>a <new> b")
    for tokens in ((), ("<new>",)):
        added = new_tokens(folder, tokens) if tokens else ()
        assert [token.id for token in added] == [own.get_vocab_size() + i for i in range(len(tokens))]
        opened = open_tokenizer(folder, added)
        own.add_special_tokens([AddedToken(token) for token in tokens])
        for text in texts:
            ids = opened.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == own.encode(text, add_special_tokens=False).ids, text
        opened.write(tmp_path / "copy")
        copy = open_tokenizer(tmp_path / "copy").tokenizer
        assert copy(list(texts))["input_ids"] == opened.tokenizer(list(texts))["input_ids"]
        assert not tokens or copy.decode([added[0].id], skip_special_tokens=True) == ""


def test_a_file_that_wins_is_said(tmp_path):
    """Qwen2's class of transformers puts its own pre-tokenizer in the place of the file's."""
    folder = folder_of(tmp_path, byte_level_by_digits(), "qwen2", tokenizer_class="Qwen2TokenizerFast")
    opened = open_tokenizer(folder)
    if opened.notes:  # a version of transformers that reads it right has nothing to say
        assert "gives other tokens than the file itself" in opened.notes[0] and "the file's are used" in opened.notes[0]


def test_a_tokenizer_that_no_class_reads_right_is_refused(tmp_path, monkeypatch):
    import megalora.data.tokenizer as tokenizer

    folder = folder_of(tmp_path, byte_level())
    monkeypatch.setattr(tokenizer, "_difference", lambda *_: "'a b' is [1 2] in the file, [3] in transformers")
    with pytest.raises(UserError, match=r"'a b' is \[1 2\] in the file.*another version of transformers"):
        open_tokenizer(folder)


def test_a_sentencepiece_model_alone(tmp_path, monkeypatch):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    (tmp_path / "corpus.txt").write_text("\n".join(["hello world who are you", "I am Mega", "be brief"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMES | {"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = open_tokenizer(tmp_path).tokenizer
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("hello  world", " who\n\nare you 你好 🙂"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == model.encode(text)
    grown = open_tokenizer(tmp_path, new_tokens(tmp_path, ["<new>"]))
    grown.write(tmp_path / "copy")  # with a tokenizer.json, which the folder lacks
    for one in (grown.tokenizer, open_tokenizer(tmp_path / "copy").tokenizer):
        ids = one("hello <new>", add_special_tokens=False)["input_ids"]
        assert ids[: len(model.encode("hello"))] == model.encode("hello") and ids[-1] == grown.added[0].id
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, texts, **_: {"input_ids": [[7]] * len(texts)})
    with pytest.raises(UserError, match="other tokens than the sentencepiece model itself"):
        open_tokenizer(tmp_path)


CODE = "import pathlib\npathlib.Path({file!r}).write_text('run')\nclass Mine: pass\n"


@pytest.mark.parametrize("with_file", [True, False])
def test_code_of_the_folder_is_never_run(tmp_path, with_file):
    folder = folder_of(
        tmp_path / "model", byte_level(), auto_map={"AutoTokenizer": ["mine.Mine", None]}, tokenizer_class="Mine"
    )
    (folder / "mine.py").write_text(CODE.format(file=str(tmp_path / "ran")))
    if not with_file:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"asks to run its own code \(mine.Mine\), which megalora never does"):
        open_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_a_class_that_transformers_has_reads_a_folder_with_code(tmp_path):
    auto_map = {"AutoTokenizer": ["mine.Mine", None]}
    folder = folder_of(tmp_path / "model", byte_level(), auto_map=auto_map, tokenizer_class="GPT2Tokenizer")
    (folder / "mine.py").write_text(CODE.format(file=str(tmp_path / "ran")))
    opened = open_tokenizer(folder)
    assert "its own tokenizer code (mine.Mine) is not run" in opened.notes[0]
    assert not (tmp_path / "ran").exists()
    (tmp_path / "copy").mkdir()
    write_tokenizer(folder, tmp_path / "copy")
    assert "auto_map" not in json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "\xff"])
def test_a_config_that_is_no_config(tmp_path, text):
    folder = folder_of(tmp_path, byte_level())
    (folder / "tokenizer_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="tokenizer_config.json") as raised:
        open_tokenizer(folder)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_a_pipe_in_place_of_a_file(tmp_path):
    import os

    folder = folder_of(tmp_path, byte_level())
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    os.mkfifo(folder / "special_tokens_map.json")
    with pytest.raises(UserError, match="special_tokens_map.json: is not a regular file"):
        open_tokenizer(folder)


def test_a_copy_carries_the_template(tmp_path):
    from transformers import AutoTokenizer

    named = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "own {{ messages[0].content }}"}
    folder = folder_of(tmp_path / "model", byte_level(), **named)
    for template in (None, "other {{ messages[0].content }}"):
        target = tmp_path / str(template)
        target.mkdir()
        write_tokenizer(folder, target, template)
        copy = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
        said = copy.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        assert said == ("own a" if template is None else "other a")
        assert read_template(target) == (template or "own {{ messages[0].content }}")
        assert copy("a  b")["input_ids"] == open_tokenizer(folder).tokenizer("a  b")["input_ids"]


def test_an_expression_of_the_file_that_backtracks_without_end(tmp_path):
    """`tokenizers` gives up after 10 million steps, by a panic, which is no Exception."""
    own = byte_level()
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    pieces = PieceTokenizer(open_tokenizer(folder_of(tmp_path, own)).tokenizer)
    assert len(pieces.ids([Segment("aaa", 1.0)])) == 3
    with pytest.raises(UserError, match=r"cannot read a text: .*retry-limit-in-match over: take the text out"):
        pieces.ids([Segment("a" * 60 + "b", 1.0)])


def test_a_vocabulary_that_lacks_the_unknown_token(tmp_path):
    own = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r"WordLevel error: Missing \[UNK\] token from the vocabulary: copy its files"):
        open_tokenizer(folder_of(tmp_path, own, unk_token=None))


def test_a_model_of_sentencepiece_that_is_damaged(tmp_path):
    """transformers takes it for one of tiktoken, which it asks for."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMES | {"tokenizer_class": "LlamaTokenizer"}))
    for data in (b"\x0a\xff" * 50, _with_byte_piece(b"<0x\x80Q>")):  # of this the library's own message is not UTF-8
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(UserError, match=r"tokenizer.model: is no sentencepiece model .*: copy it again"):
            open_tokenizer(tmp_path)


def _with_byte_piece(piece: bytes) -> bytes:
    """A sentencepiece model of four pieces, the last one of a byte."""
    pieces = [(b"<unk>", 2), (b"<s>", 3), (b"</s>", 3), (piece, 6)]
    fields = [b"\x0a" + bytes([len(name)]) + name + b"\x18" + bytes([kind]) for name, kind in pieces]
    trainer = b"\x12\x05" + b"\x18\x02" + b"\xb8\x02\x01"  # BPE, byte_fallback
    return b"".join(b"\x0a" + bytes([len(field)]) + field for field in fields) + trainer
