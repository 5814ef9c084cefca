"""Words: the tokens of words that were seen before, so that a tokenizer is asked for new ones alone.

A byte-level tokenizer cuts a text into words first and merges bytes within each. The expressions listed here all cut
between a character that is no white space and a space (U+0020), and what they make of a word does not depend on what is
before that place or behind it. So a text may be cut there, and the tokens of its words are those of the text:

    "The cat  sat.\nThe cat"   ->   "The", " cat", "  sat.\nThe", " cat"

Most words of a data set are a few thousand, and a dictionary is several times as fast as the tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# Spaces and what follows them, up to a space behind a character that is no white space.
_WORDS = re.compile(r" *[^ ]+(?:(?<=\s) +[^ ]*)*| +")
_MOST_WORDS, _LONGEST_WORD = 1 << 17, 48  # kept: about 30 MB
_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH}?"

# The expressions of published tokenizers that are known to cut there.
KNOWN_CUTS = frozenset(
    {
        rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",  # Qwen2, Qwen3
        rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",  # Llama 3
        rf"{_O200K}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",  # gpt-oss, Llama 4
        # DeepSeek-V3 cuts three times
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
        rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    }
)


class WordTokens:
    """Tokenises texts word by word. backend: a tokenizer for which `cuts_at_spaces` is true."""

    def __init__(self, backend: Any):
        self._backend = backend
        self._known: dict[str, bytes] = {}  # ids, int32

    def __reduce__(self) -> tuple[Any, ...]:
        return WordTokens, (self._backend,)  # another process learns words of its own

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, [n] int32, without tokens that the tokenizer sets around one."""
        cut, known = [_WORDS.findall(text) for text in texts], self._known
        new = list(set().union(*cut).difference(known))
        encoded = self._backend.encode_batch_fast(new, add_special_tokens=False)
        known.update((word, np.array(one.ids, np.int32).tobytes()) for word, one in zip(new, encoded, strict=True))
        found = [np.frombuffer(b"".join(map(known.__getitem__, words)), np.int32) for words in cut]
        for word in new:
            if len(word) > _LONGEST_WORD:
                del known[word]
        if len(known) > _MOST_WORDS:
            known.clear()
        return found


def cuts_at_spaces(backend: Any) -> bool:
    """Return whether a tokenizer of the tokenizers library is known to cut texts as `WordTokens` does."""
    if type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return False
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word or re.search(r"\s", token.content) for token in added):
        return False
    if backend.normalizer is not None and _written(backend.normalizer) != {"type": "NFC"}:
        return False
    return backend.pre_tokenizer is not None and _known_cuts(_written(backend.pre_tokenizer))


def _known_cuts(cut: dict[str, Any]) -> bool:
    """Return whether what cuts a text into words ends with one of GPT-2's kind, and all before it is known too."""
    *before, last = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    expressions = [step["pattern"].get("Regex") for step in before if step["type"] == "Split"]
    return (
        last["type"] == "ByteLevel"
        and not last["add_prefix_space"]
        and (last["use_regex"] or any(" " in (one or "") for one in expressions))
        and all(one in KNOWN_CUTS for one in expressions)
        and all(_isolates(step) or step["type"] == "Digits" for step in before)
    )


def _isolates(step: dict[str, Any]) -> bool:
    return step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]


def _written(part: Any) -> dict[str, Any]:
    return json.loads(part.__getstate__())
