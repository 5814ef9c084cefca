"""Rows with labels: shapes, spans, CoNLL files, words to pieces, and one clear line for each that cannot be used."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny

from megalora.data import DataSettings, FieldNames, load_dataset, read_rows
from megalora.data.classes import ClassRows, _boxes_of, choose_labels
from megalora.data.encode import EncodeSettings
from megalora.data.labelled import read_labelled, read_tagged
from megalora.data.tokenizer import OpenedTokenizer
from megalora.errors import UserError

LABELS = ("B-LOC", "B-PER", "I-PER", "O")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return ClassRows(OpenedTokenizer(tiny.tokenizer(), folder), "TOKEN_CLS", LABELS)


@pytest.mark.parametrize(
    "row",
    [
        {"tokens": ["Ada", "Roe", "ran", "."], "tags": ["B-PER", "I-PER", "O", "O"]},
        {"id": 3, "words": ["Ada", "Roe", "ran", "."], "ner_tags": ["B-PER", "I-PER", "O", "O"]},
        {"text": "Ada Roe ran.", "spans": [{"start": 0, "end": 7, "label": "PER"}]},
        {"text": "Ada Roe ran.", "entities": [[0, 7, "PER"]]},
    ],
)
def test_shapes_of_tagged_rows(row):
    found = read_tagged(row, "row 0")
    assert [word.text for word in found.words] == ["Ada", "Roe", "ran", "."]
    assert found.tags == ("B-PER", "I-PER", "O", "O")


def test_a_span_that_begins_in_a_word_cuts_it():
    found = read_tagged({"text": "It was 5km.", "spans": [{"start": 8, "end": 10, "label": "UNIT"}]}, "row 0")
    assert [(word.text, word.spaced) for word in found.words][2:] == [("5", True), ("km", False), (".", False)]
    assert found.tags[2:] == ("O", "B-UNIT", "O")


def test_each_piece_has_the_box_of_its_word(rows):
    row = {"tokens": ["Adagio", "in", "g"], "tags": ["O"] * 3, "bbox": [[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]]}
    placed = replace(rows, columns=("boxes",))
    sample = placed.encoder(EncodeSettings(64)).sample(placed.read(row, "row 0"), "row 0")
    words = np.cumsum(sample.columns["classes"] != -100) - 1
    assert len(words) > 3 and sample.columns["boxes"].tolist() == [row["bbox"][word] for word in words]
    assert _boxes_of([None, 0, 0, 1, None, None], [(1, 2, 3, 4), (5, 6, 7, 8)]).tolist() == [
        [0, 0, 0, 0], [1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8], [1000] * 4, [1000] * 4,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        (None, "row 0: has no bbox"),
        ([[1, 2, 3, 4]], "2 tokens but 1 boxes"),
        ([[1, 2, 3, 4], [1, 2, 3, 1001]], "box 1 of bbox"),
        ([[1, 2, 3, 4], [3, 2, 1, 4]], "box 1 of bbox"),
        ([[0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4]], "box 0 of bbox"),
        ("x", "bbox is a JSON string"),
    ],
)
def test_a_bad_box_is_told(boxes, told):
    row = {"tokens": ["a", "b"], "tags": ["O", "O"], "bbox": boxes}
    with pytest.raises(UserError, match=told):
        read_tagged(row, "row 0", boxed=True)
    with pytest.raises(UserError, match="has no tokens"):
        read_tagged({"text": "a"}, "row 0", question=True, boxed=True)


def test_boxes_are_refused_where_no_model_reads_them():
    with pytest.raises(UserError, match="bbox"):
        read_tagged({"tokens": ["a"], "tags": ["O"], "bbox": [[1, 2, 3, 4]]}, "row 0")


BAD = [
    ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens but 1 tags"),
    ({"tokens": ["a", ""], "tags": ["O", "O"]}, "token 1"),
    ({"tokens": ["a"], "tags": [None]}, "tags is not a list"),
    ({"tokens": ["a"], "tags": ["O"], "image": "x.png"}, "image"),
    ({"text": "abc"}, "no spans"),
    ({"text": "abc", "spans": [{"start": 1, "end": 9, "label": "X"}]}, "text of 3 characters"),
    ({"text": "abc", "spans": [[0, 2, "X"], [1, 3, "Y"]]}, "overlap"),
    ({"prompt": 1}, "no known shape"),
    ([], "make it an object"),
]


@pytest.mark.parametrize(("row", "told"), BAD)
def test_a_bad_row_is_told_by_its_name(row, told):
    with pytest.raises(UserError, match="row 7") as error:
        read_tagged(row, "row 7")
    assert told in str(error.value) and "\n" not in str(error.value)


def test_shapes_of_labelled_texts():
    assert read_labelled({"text": "a", "label": 1}, "r").label == 1
    pair = read_labelled({"premise": "a", "hypothesis": "b", "label": "yes", "idx": 4}, "r")
    assert (pair.text, pair.second, pair.label) == ("a", "b", "yes")
    assert read_labelled("a", "r", question=True).label is None
    bad = ({"text": "a"}, {"text": "", "label": 1}, {"text": "a", "label": [1]}, {"text": "a", "label": 1, "x": 2})
    for row in bad:
        with pytest.raises(UserError, match="row 7"):
            read_labelled(row, "row 7")


def test_conll(tmp_path):
    file = tmp_path / "a.conll"
    file.write_text("-DOCSTART- -X- O\n\nAda NNP B-PER\nran VBD O\n\n\nRome NNP B-LOC")
    assert list(read_rows(file)) == [
        {"tokens": ["Ada", "ran"], "tags": ["B-PER", "O"]}, {"tokens": ["Rome"], "tags": ["B-LOC"]}
    ]  # fmt: skip
    file.write_text("Ada B-PER\nran\n")
    with pytest.raises(UserError, match="line 2"):
        list(read_rows(file))


def test_the_first_piece_of_a_word_has_its_class(rows):
    encoder = rows.encoder(EncodeSettings(64))
    sample = encoder.sample(read_tagged({"tokens": ["Ada", "zzzzz"], "tags": ["B-PER", "O"]}, "r"), "r")
    pieces = [len(rows.tokenizer(word, add_special_tokens=False)["input_ids"]) for word in (" Ada", " zzzzz")]
    assert pieces[1] > 1 and len(sample.input_ids) == sum(pieces)
    expected = [LABELS.index("B-PER"), *[-100] * (pieces[0] - 1), LABELS.index("O"), *[-100] * (pieces[1] - 1)]
    assert sample.columns["classes"].tolist() == expected
    for tag in ("B-ORG", 4, -1):
        with pytest.raises(UserError, match="none of the 4 labels"):
            encoder.sample(read_tagged({"tokens": ["a"], "tags": [tag]}, "r"), "r")


def test_rows_through_the_cache_are_packed_unshifted(rows, tmp_path):
    data = [{"tokens": ["Ada", "Roe"], "tags": ["B-PER", "I-PER"]}, {"tokens": ["a"] * 30, "tags": ["B-LOC"] * 30}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(data))
    for _ in range(2):  # made, and found
        packed = load_dataset(file, rows, DataSettings(128, data_cache=tmp_path / "cache"), 1)
        assert packed.rows == 1 and packed.labelled_tokens == 32
        row = packed.row(0)
        assert sorted(label for label in row.labels.tolist() if label != -100) == [0] * 30 + [1, 2]
    with pytest.raises(UserError, match="truncate or skip"):
        load_dataset(file, rows, DataSettings(16), 1)
    cut = load_dataset(file, rows, DataSettings(16, on_long_row="truncate"), 1)
    assert "1 rows longer than seq_length were truncated" in cut.notes
    with pytest.raises(UserError, match="on_long_row split"):
        load_dataset(file, rows, DataSettings(16, on_long_row="split"), 1)


def test_labels_of_config_and_data(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}))
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}, {"bad": 1}]))
    assert choose_labels("SEQ_CLS", tmp_path, file, FieldNames()) == ("neg", "pos")
    file.write_text(json.dumps([{"text": "a", "label": 2}, {"text": "b", "label": 0}]))
    assert choose_labels("SEQ_CLS", tmp_path, file, FieldNames()) == ("LABEL_0", "LABEL_1", "LABEL_2")
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "no", "1": "yes"}}))
    assert choose_labels("SEQ_CLS", tmp_path, file, FieldNames()) == ("no", "yes")
    one, other = {"text": "a", "label": "x"}, {"text": "a", "label": 1}
    for content, told in (([one], "1 label;"), ([one, other], "names and")):
        (tmp_path / "config.json").write_text("{}")
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=told):
            choose_labels("SEQ_CLS", tmp_path, file, FieldNames())
    file.write_text(json.dumps([{"input": "a", "output": "b"}] * 2))
    for task, shape in (("SEQ_CLS", r"{text, label}"), ("TOKEN_CLS", r"{tokens, tags}")):
        with pytest.raises(UserError, match=rf"row 0: no known shape \(fields input, output\): write {shape}"):
            choose_labels(task, tmp_path, file, FieldNames())
    (tmp_path / "config.json").write_text(json.dumps({"problem_type": "regression"}))
    with pytest.raises(UserError, match="problem_type"):
        choose_labels("SEQ_CLS", tmp_path, file, FieldNames())
