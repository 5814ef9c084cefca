"""Tokenizer files made up by somebody: a tokenizer that can be used, or an error of ours, whatever is in them."""

from __future__ import annotations

import json
import shutil

import pytest
from fuzz import JSON, edited, examples, ours_only
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from megalora.data.conversation import Conversation, Message
from megalora.data.template import ChatTemplate, TemplateOptions
from megalora.data.tokenizer import new_tokens, open_tokenizer, tokenizer_identity, tokens_beyond

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "\u2581", "\u2581b", "ab"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role + message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant{% endif %}"
)
PARTS = {
    "normalizer": normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
    "pre_tokenizer": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("(a|aa)+$|\n"), "isolated"), pre_tokenizers.Metaspace(), pre_tokenizers.Digits()]
    ),
    "decoder": decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "post_processor": processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)]),
}
CONFIG = NAMES | {
    "added_tokens_decoder": {"2": {"content": "</s>", "special": True, "lstrip": False}},
    "additional_special_tokens": ["<s>"],
    "chat_template": TEMPLATE,
    "model_max_length": 64,
    "padding_side": "left",
    "truncation_side": "left",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "add_bos_token": True,
    "add_prefix_space": False,
    "split_special_tokens": False,
    "legacy": False,
    "extra_special_tokens": {"tool": "ab"},
    "model_input_names": ["input_ids"],
}  # fmt: skip
CLASSES = ["LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "BertTokenizer", "T5Tokenizer"]
FILES = {
    "special_tokens_map.json": NAMES | {"additional_special_tokens": ["ab", {"content": "<s>", "special": True}]},
    "added_tokens.json": {"<new>": len(WORDS)},
    "config.json": {"model_type": "llama", "tokenizer_class": "LlamaTokenizer", "vocab_size": len(WORDS)},
}


def backends() -> list[Tokenizer]:
    ids = {word: i for i, word in enumerate(WORDS)}
    made = [
        Tokenizer(models.BPE(ids, [("a", "b"), ("\u2581", "b")], unk_token="<unk>", fuse_unk=True)),
        Tokenizer(models.Unigram([(word, -float(i)) for word, i in ids.items()], 0, False)),
        Tokenizer(models.WordPiece(ids, unk_token="<unk>")),
        Tokenizer(models.WordLevel(ids, unk_token="<unk>")),
    ]
    for backend in made:
        for name, part in PARTS.items():
            setattr(backend, name, part)
        backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    return made


BODIES = [json.loads(backend.to_str()) for backend in backends()]


def write(folder, name, value) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), "utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The bytes of a sentencepiece model."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = tmp_path_factory.mktemp("model")
    (folder / "corpus.txt").write_text("\n".join(["hello world who are you", "a b c be brief"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=290, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )  # fmt: skip
    return (folder / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    write(folder, "tokenizer.json", BODIES[0])
    return folder


def use(folder, sound) -> None:
    """As finetune and generate do."""
    opened = open_tokenizer(folder)
    tokenizer_identity(opened.tokenizer)
    template = ChatTemplate.of(opened, None, TemplateOptions())
    sample = template.encode(Conversation((Message("user", "a b"), Message("assistant", "c a", trained=True))))[0]
    opened.tokenizer.decode(sample.input_ids.tolist(), skip_special_tokens=True)
    tokens_beyond(folder, sound)
    open_tokenizer(folder, new_tokens(folder, ["<n>"]))


def fresh(tmp_path):
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body["model"]["type"])
def test_the_sound_ones_are_read(sound, tmp_path, body):
    folder = fresh(tmp_path)
    write(folder, "tokenizer.json", body)
    for name, value in (FILES | {"tokenizer_config.json": CONFIG}).items():
        write(folder, name, value)
    use(folder, sound)


@examples(20)
@given(data=st.data())
def test_any_tokenizer_json(sound, tmp_path, data):
    folder = fresh(tmp_path)
    body = data.draw(st.sampled_from(BODIES))
    for _ in range(data.draw(st.integers(1, 2))):
        body = data.draw(edited(body)) if isinstance(body, dict) and body else body
    write(folder, "tokenizer.json", body)
    if data.draw(st.booleans()):
        write(folder, "tokenizer_config.json", CONFIG | {"tokenizer_class": data.draw(st.sampled_from(CLASSES))})
    ours_only(lambda: use(folder, sound))


@examples(20)
@given(data=st.data())
def test_any_config_of_a_tokenizer(sound, tmp_path, data):
    folder = fresh(tmp_path)
    write(folder, "tokenizer.json", BODIES[0])
    values = JSON | st.sampled_from([*CLASSES, *WORDS, 2**31, 2**63, [["default", "x"]], [{"name": "default"}]])
    body = CONFIG | data.draw(st.dictionaries(st.sampled_from([*CONFIG, "auto_map", "pad_token"]), values, max_size=2))
    write(folder, "tokenizer_config.json", data.draw(edited(body)))
    for name in data.draw(st.sets(st.sampled_from(sorted(FILES)))):
        write(folder, name, data.draw(edited(FILES[name])))
    ours_only(lambda: use(folder, sound))


@pytest.mark.parametrize("name", ["extra_special_tokens", "additional_special_tokens"])
def test_a_list_of_special_tokens_that_is_none(name, sound, tmp_path):
    folder = fresh(tmp_path)
    write(folder, "tokenizer.json", BODIES[0])
    write(folder, "tokenizer_config.json", CONFIG | {"extra_special_tokens": None, name: True})
    assert not ours_only(lambda: use(folder, sound))


@examples(20)
@given(data=st.data())
def test_any_sentencepiece_model(sound, model, tmp_path, data):
    """Above all at its end, where its settings are: what is before them is one token after another."""
    folder = fresh(tmp_path)
    whole = bytearray(model)
    for _ in range(data.draw(st.integers(0, 3))):
        from_end, new = data.draw(st.integers(1, 400) | st.integers(1, len(whole))), data.draw(st.binary(min_size=1))
        whole[len(whole) - from_end : len(whole) - from_end + len(new)] = new
    (folder / "tokenizer.model").write_bytes(whole[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))])
    write(folder, "tokenizer_config.json", CONFIG | {"tokenizer_class": data.draw(st.sampled_from(CLASSES))})
    ours_only(lambda: use(folder, sound))


TEXTS = st.lists(st.sampled_from([*WORDS, "a b", "#version", "\ufeff", "\x00", " ", "## b", "a b c"]), max_size=12)


@examples(20)
@given(data=st.data())
def test_any_vocabulary(sound, tmp_path, data):
    """As older folders have them: vocab.json with merges.txt, or vocab.txt."""
    folder = fresh(tmp_path)
    ids = {word: i for i, word in enumerate([*WORDS, "\u0120", "\u0120b"])}
    write(folder, "vocab.json", data.draw(st.just(ids) | edited(ids)))
    (folder / "merges.txt").write_text("\n".join(data.draw(TEXTS)))
    write(folder, "vocab.txt", "\n".join(data.draw(TEXTS)))
    (folder / data.draw(st.sampled_from(["vocab.json", "vocab.txt", "merges.txt"]))).unlink()
    if data.draw(st.booleans()):
        write(folder, "special_tokens_map.json", FILES["special_tokens_map.json"])
    write(folder, "tokenizer_config.json", CONFIG | {"tokenizer_class": data.draw(st.sampled_from(CLASSES))})
    ours_only(lambda: use(folder, sound))
