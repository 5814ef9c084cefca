"""ROUGE-L: the definition, by hand and against rouge-score where that is installed."""

import functools
import random

import pytest

from megalora.tasks.rouge import longest_common, rouge_l, words_of

# What rouge_score.rouge_scorer.RougeScorer(["rougeL"]) 0.1.2 gives: (target, prediction) -> fmeasure
THEIRS = [
    ("The cat sat on the mat.", "the cat lay on the mat", 0.8333333333333334),
    ("police killed the gunman", "police kill the gunman", 0.75),
    ("police killed the gunman", "the gunman kill police", 0.5),
    ("It's 3.5 kg, isn't it?", "it is 3 kg", 0.5),
    ("a b c d e f g", "g f e d c b a", 0.14285714285714285),
    ("snake_case and CamelCase", "snake case and camelcase", 1.0),
    ("one", "", 0.0),
    ("...", "one", 0.0),
]


@pytest.mark.parametrize(("expected", "said", "score"), THEIRS)
def test_scores_of_rouge_score(expected, said, score):
    assert rouge_l(expected, said) == pytest.approx(score, abs=1e-15)


def test_random_texts_against_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    draw = random.Random(3)
    for _ in range(200):
        a, b = ("".join(draw.choices("ab c.D,1_-'\n", k=draw.randrange(60))) for _ in "ab")
        assert rouge_l(a, b) == pytest.approx(scorer.score(a, b)["rougeL"].fmeasure, abs=1e-12), (a, b)


def test_the_longest_common_subsequence_is_that_of_its_definition():
    draw = random.Random(1)
    for _ in range(100):
        a, b = ([draw.randrange(4) for _ in range(draw.randrange(12))] for _ in "ab")

        @functools.cache
        def longest(i: int, j: int, a=tuple(a), b=tuple(b)) -> int:
            if i == len(a) or j == len(b):
                return 0
            return 1 + longest(i + 1, j + 1) if a[i] == b[j] else max(longest(i + 1, j), longest(i, j + 1))

        assert longest_common(a, b) == longest(0, 0)


def test_words_of_other_scripts():
    assert words_of("Café NAÏVE Ωmega") == ["café", "naïve", "ωmega"]
    assert words_of("我们 are 3 人。") == ["我", "们", "are", "3", "人"]
    assert rouge_l("今天天气好", "今天天气很好") == pytest.approx(10 / 11)
