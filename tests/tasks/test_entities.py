"""Entities of tags, by the rules of seqeval and the CoNLL-2000 script; each expectation was counted by hand."""

import pytest

from megalora.tasks import TASKS
from megalora.tasks.entities import Counts, Entity, are_entity_tags, count, entities, kinds_of


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-A I-A O B-B", [("A", 0, 2), ("B", 3, 4)]),
        ("I-A I-A O", [("A", 0, 2)]),  # IOB1: an entity may begin with I-
        ("B-A B-A", [("A", 0, 1), ("A", 1, 2)]),
        ("B-A I-B", [("A", 0, 1), ("B", 1, 2)]),
        ("I-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("B-A E-A S-B O", [("A", 0, 2), ("B", 2, 3)]),
        ("B-A E-A I-A", [("A", 0, 2), ("A", 2, 3)]),
        ("O I-A O I-A", [("A", 1, 2), ("A", 3, 4)]),
        ("B-A-B I-A-B", [("A-B", 0, 2)]),
        ("", []),
    ],
)
def test_entities(tags, expected):
    assert entities(tags.split()) == {Entity(*one) for one in expected}


def test_counts_of_a_document():
    predicted, expected = "B-A I-A O B-B".split(), "B-A I-A B-B B-B".split()
    assert count(predicted, expected, ("A", "B")) == [Counts(1, 1, 1), Counts(1, 1, 2)]
    assert Counts(1, 2, 4).f1 == pytest.approx(2 * 0.5 * 0.25 / 0.75)
    assert Counts(0, 0, 0).f1 == 0.0


def test_which_labels_are_tags_of_entities():
    assert are_entity_tags(("O", "B-X", "I-X")) and kinds_of(("O", "B-X", "I-X", "B-A")) == ("A", "X")
    for labels in (("NOUN", "VERB"), ("O",), ("neg", "pos"), ("B-", "O")):
        assert not are_entity_tags(labels)


def test_reports():
    labels = ("O", "B-X", "I-X")
    report = TASKS["TOKEN_CLS"].report([4.0, 6.0, 1.0, 2.0, 2.0], 8, labels)
    assert report == {"loss": 0.5, "accuracy": 0.75, "precision": 0.5, "recall": 0.5, "f1": 0.5, "f1_X": 0.5}
    report = TASKS["SEQ_CLS"].report([4.0, 3.0, 1.0, 2.0, 1.0, 2.0, 2.0, 3.0], 4, ("neg", "pos"))
    assert report["accuracy"] == 0.75 and report["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert list(report)[0] == "loss"
