"""Pieces of text -> tokens: every piece is tokenised by itself, in few calls to the tokenizer for many documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError
from ..pictures import Picture
from .tokenizer import told_as
from .words import WordTokens, cuts_at_spaces

IGNORE = -100
Tokens = Sequence[int] | np.ndarray  # ids
# What stands before a piece from the middle of a text, where the tokenizer sets a space before any text. A newline is
# one byte token in most such vocabularies and merges with nothing; the second is of none, so it is a few byte tokens.
_GUARDS = ("\n", "\ue0f3")


@dataclass(frozen=True)
class Sample:
    """One document. input_ids [n] int32; labels [n] int32, not shifted: labels[t] is input_ids[t] or -100.

    weights  [n] float32, what each label counts for in the loss, 0 where there is none; None: all labels count 1
    columns  what else a task or a model reads of each token, by name: [n] or [n, k] int32. "classes" is what is to be
             learned where that is no token: the class of each token, -100 where there is none
    picture  an image that stands before the text: its tokens are the first ones
    """

    input_ids: np.ndarray
    labels: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    weights: np.ndarray | None = None
    picture: Picture | None = None

    def part(self, block: slice) -> Sample:
        """Return a part of the document, which must not be read for columns."""
        assert not self.columns and self.picture is None
        weights = None if self.weights is None else self.weights[block]
        return Sample(self.input_ids[block], self.labels[block], weights=weights)


@dataclass(frozen=True)
class Segment:
    """A piece of a document's text that is tokenised by itself.

    weight    what its labels count for in the loss; 0: it carries none
    verbatim  it is a special token that a message writes, and is tokenised as text
    """

    text: str
    weight: float
    verbatim: bool = False


class PieceTokenizer:
    """Tokenises documents that are given as pieces."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        with told_as("the tokenizer cannot be used", "copy its files again"):
            self._guards = _guards(tokenizer)
            backend = getattr(tokenizer, "backend_tokenizer", None)
            by_words = backend is not None and not self._guards and cuts_at_spaces(backend)
            self._words = WordTokens(backend) if by_words else None

    def samples(self, documents: Sequence[Sequence[Segment]]) -> list[Sample]:
        """Return documents as samples. Raises UserError for a special token that cannot be tokenised as text."""
        samples = []
        for pieces, parts in zip(documents, self._tokens(documents), strict=True):
            input_ids = _joined(parts)
            labels, weights, at = input_ids.copy(), None, 0
            if any(piece.weight not in (0, 1) for piece in pieces):
                weights = np.empty(len(input_ids), np.float32)
            for piece, ids in zip(pieces, parts, strict=True):
                stop = at + len(ids)
                if not piece.weight > 0:
                    labels[at:stop] = IGNORE
                if weights is not None:
                    weights[at:stop] = piece.weight
                at = stop
            samples.append(Sample(input_ids, labels, weights=weights))
        return samples

    def ids(self, pieces: Sequence[Segment]) -> list[int]:
        """Return the tokens of one document."""
        return _joined(self._tokens([pieces])[0]).tolist()

    def _tokens(self, documents: Sequence[Sequence[Segment]]) -> list[list[Tokens]]:
        """Return the token ids of each document and piece."""
        flat = [(piece, number > 0) for pieces in documents for number, piece in enumerate(pieces)]
        found: list[Tokens] = [[]] * len(flat)
        for verbatim in (False, True):
            places = [place for place, (piece, _) in enumerate(flat) if piece.verbatim == verbatim]
            texts = [flat[place][0].text for place in places]
            inner = [flat[place][1] for place in places]
            for place, ids in zip(places, self._encode(texts, inner, verbatim), strict=True):
                found[place] = ids
        tokens = iter(found)
        return [[next(tokens) for _ in pieces] for pieces in documents]

    def _encode(self, texts: list[str], inner: list[bool], verbatim: bool) -> Sequence[Tokens]:
        """Return token ids. inner: the piece is from the middle of a text, so that it gets no space of its own."""
        if not texts:
            return []
        if not self._guards:
            return self._call(texts, verbatim)
        guard, its_ids = self._guards[0]
        encoded = self._call(
            [guard + text if not_first else text for text, not_first in zip(texts, inner, strict=True)], verbatim
        )
        for place, not_first in enumerate(inner):
            if not_first:
                ids = encoded[place]
                cut = _behind(ids, its_ids)
                encoded[place] = self._otherwise(texts[place], verbatim) if cut is None else cut
        return encoded

    def _otherwise(self, text: str, verbatim: bool) -> list[int]:
        """Return a piece whose first token merges with the first guard."""
        for guard, its_ids in self._guards[1:]:
            cut = _behind(self._call([guard + text], verbatim)[0], its_ids)
            if cut is not None:
                return cut
        raise UserError(
            f"the tokenizer has no token that stays apart before {text[:20]!r}", "use one with byte fallback"
        )

    def _call(self, texts: list[str], verbatim: bool) -> list[Any]:
        with told_as("the tokenizer cannot read a text", "take the text out, or use another tokenizer"):
            return self._called(texts, verbatim)

    def _called(self, texts: list[str], verbatim: bool) -> list[Any]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None and not verbatim:  # by itself: no offsets, no copies
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = False
            if self._words is not None:
                return self._words.ids(texts)
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        # verbose=False: documents longer than the tokenizer's model_max_length are judged elsewhere
        more = {"split_special_tokens": True} if verbatim else {}
        found = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **more)
        found = found["input_ids"]
        if verbatim:
            for text, ids in zip(texts, found, strict=True):
                if self._tokenizer.convert_tokens_to_ids(text.removeprefix(_GUARDS[0]).removeprefix(_GUARDS[1])) in ids:
                    raise UserError(
                        f"the tokenizer cannot write {text.strip()!r} as text",
                        "take it out of the messages, or give --special_tokens_in_text true for the token itself",
                    )
        return found


def _joined(parts: Sequence[Tokens]) -> np.ndarray:
    """Return [n] int32, the token ids of pieces one after another."""
    return np.concatenate([np.asarray(ids, np.int32) for ids in parts]) if parts else np.empty(0, np.int32)


def _behind(ids: list[int], guard: list[int]) -> list[int] | None:
    return ids[len(guard) :] if ids[: len(guard)] == guard else None


def _guards(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Return (text, its tokens) of what may stand before a piece; none where the tokenizer sets no space before a text.
    """
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
    if not first or not first[0].startswith("\u2581"):
        return []
    known = [(guard, tokenizer(guard, add_special_tokens=False)["input_ids"]) for guard in _GUARDS]
    return [(guard, ids) for guard, ids in known if ids] or [(_GUARDS[0], [])]
