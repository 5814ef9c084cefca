"""Long rows: conversations of more than seq_length tokens, cut or split at the borders of turns.

Both work on conversations and encode what they propose, so that what is trained is what the template gives for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import UserError
from .conversation import Conversation, Message
from .template import IGNORE, Sample

Encode = Callable[[Conversation], Sample]


def truncate(conversation: Conversation, sample: Sample, seq_length: int, encode: Encode) -> tuple[list[Sample], str]:
    """Return the conversation cut behind the last reply that fits, and what was done.

    Where not even the first reply fits, it is cut inside: it has no end token then. sample: the whole conversation,
    encoded. Raises UserError where the text before the first reply already fills seq_length.
    """
    if conversation.text is not None:
        return [_head(sample, seq_length)], "cut inside a text"
    stops = [turn + 1 for turn, message in enumerate(conversation.messages) if message.role == "assistant"]
    kept = _most(len(stops), lambda n: encode(_part(conversation, 0, stops[n - 1])), seq_length)
    if kept is not None:
        return [kept[1]], "cut behind a reply"
    first = encode(_part(conversation, 0, stops[0])) if len(stops) > 1 else sample
    cut = _head(first, seq_length)
    if (cut.labels[1:] == IGNORE).all():
        raise UserError("the text before the first reply fills it alone", "raise --seq_length")
    return [cut], "cut inside a reply"


def split(conversation: Conversation, sample: Sample, seq_length: int, encode: Encode) -> tuple[list[Sample], str]:
    """Return the conversation as several documents, and what was done.

    Each begins with the system message of the row and has as many whole exchanges as fit; a text is cut every
    seq_length tokens. Raises UserError where one exchange alone does not fit.
    """
    if conversation.text is not None:
        starts = range(0, len(sample.input_ids), seq_length)
        blocks = [slice(start, start + seq_length) for start in starts]
        return [sample.part(block) for block in blocks], "split"
    borders = _borders(conversation.messages)
    documents, at = [], 0
    while at < len(borders) - 1:
        first = borders[at]
        found = _most(
            len(borders) - 1 - at,
            lambda n, at=at, first=first: encode(_part(conversation, first, borders[at + n])),
            seq_length,
        )
        if found is None:
            tokens = len(encode(_part(conversation, first, borders[at + 1])).input_ids)
            raise UserError(
                f"message {first + 1} and its reply are {tokens} tokens by themselves", "raise --seq_length"
            )
        documents.append(found[1])
        at += found[0]
    return documents, "split"


def _most(count: int, encode: Callable[[int], Sample], seq_length: int) -> tuple[int, Sample] | None:
    """Return the largest n in 1..count whose encoding fits, and the encoding. Lengths grow with n."""
    best, low, high = None, 1, count
    while low <= high:
        middle = (low + high) // 2
        sample = encode(middle)
        if len(sample.input_ids) <= seq_length:
            best, low = (middle, sample), middle + 1
        else:
            high = middle - 1
    return best


def _borders(messages: Sequence[Message]) -> list[int]:
    """Return where exchanges begin, and the end: an exchange is a user's message (with system messages before it) and
    all that answers it.
    """
    head = len(_system(messages))
    starts = [
        turn
        for turn in range(head, len(messages))
        if messages[turn].role in ("system", "user") and (turn == head or messages[turn - 1].role != "system")
    ]
    return [*starts, len(messages)]


def _part(conversation: Conversation, start: int, stop: int) -> Conversation:
    """Return the messages from `start` to `stop` behind the system messages that the row begins with."""
    system = _system(conversation.messages)
    messages = conversation.messages[max(start, len(system)) : stop]
    return replace(conversation, messages=(*system, *messages))


def _system(messages: Sequence[Message]) -> tuple[Message, ...]:
    count = next((turn for turn, message in enumerate(messages) if message.role != "system"), len(messages))
    return tuple(messages[:count])


def _head(sample: Sample, seq_length: int) -> Sample:
    return sample.part(slice(seq_length))
