"""Tokens of languages around sources and targets: those that transformers' tokenizers of NLLB set."""

import json

import pytest
import talking
import transformers

from megalora.data.packing import Sides
from megalora.data.pairs import PairRows
from megalora.data.tokenizer import open_tokenizer
from megalora.errors import UserError


@pytest.fixture
def folder(tmp_path):
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefgh"]
    tokenizer = transformers.NllbTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], src_lang="eng_Latn", tgt_lang="deu_Latn",
        extra_special_tokens=["eng_Latn", "deu_Latn"],
    )  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def changed(folder, **fields):
    """The rows of the folder with other fields in tokenizer_config.json."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return PairRows(open_tokenizer(folder), Sides(32, 2))


def test_each_side_has_the_tokens_of_its_language(folder):
    rows = changed(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = tokenizer("a bad", text_target="a cab")
    for _ in range(2):  # in either order
        assert rows.source("a bad") == wanted.input_ids and rows.target("a cab") == wanted.labels
    assert wanted.input_ids[0] != wanted.labels[0] and wanted.labels[-1] == 2
    assert rows.description == "pairs of source (eng_Latn) and target (deu_Latn)"


def test_other_tokenizers_have_none(tmp_path, monkeypatch):
    """Also where all have the methods that switch between languages, as in transformers 4."""
    base = transformers.PreTrainedTokenizerBase
    for name in ("_switch_to_input_mode", "_switch_to_target_mode"):
        monkeypatch.setattr(base, name, lambda self: None, raising=False)
    talking.tokenizer().save_pretrained(tmp_path)
    rows = PairRows(open_tokenizer(tmp_path), Sides(32, 2))
    assert rows.source("a b") == rows.target("a b") and rows.description == "pairs of source and target"


def test_another_language_is_another_way_to_read_rows(folder):
    """Neither kept documents nor a run of the one are taken for the other's."""
    first, other = changed(folder), changed(folder, tgt_lang="eng_Latn")
    assert first.target("a") != other.target("a") and first.identity() != other.identity()


@pytest.mark.parametrize(
    "language, told", [(None, "does not say tgt_lang"), ("xyz_Latn", "has no token for 'xyz_Latn'")]
)
def test_a_language_that_is_missing_is_an_error(folder, language, told):
    rows = changed(folder, tgt_lang=language)
    assert rows.source("a")
    with pytest.raises(UserError, match=f"its tokenizer {told}.*the language of targets"):
        rows.target("a")
