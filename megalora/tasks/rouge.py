"""ROUGE-L of a reply and the text expected (Lin 2004): F1 of the longest common subsequence of their words.

On English text it is what the package rouge-score gives without stemming; that one drops all letters but a to z, and
texts in other scripts score 0 there. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

# Scripts that set no spaces: each character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNSPACED += "\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """Return the words of a text: runs of letters and digits, in lower case."""
    return _WORD.findall(text.lower())


def rouge_l(expected: str, said: str) -> float:
    """Return ROUGE-L of a reply, 0 to 1; 0 where one of both has no words."""
    theirs, ours = words_of(expected), words_of(said)
    common = longest_common(theirs, ours)
    return 2 * common / (len(theirs) + len(ours)) if common else 0.0


def longest_common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence, by whole numbers of len(a) bits (Hyyro 2004)."""
    places: dict[Hashable, int] = {}
    for place, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << place
    every = (1 << len(a)) - 1
    row = every
    for item in b:
        matched = row & places.get(item, 0)
        row = (row + matched | row - matched) & every
    return (row ^ every).bit_count()
