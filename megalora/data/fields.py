"""Fields of a row: each is read, refused by name, or on a list of names known to be harmless and counted.

`Fields` wraps one object of a row (the row itself, a turn, a part of a text). A format takes what it reads and then
calls `finish`, which judges what is left. So a field that no one thought of stops the run and is never lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import UserError

COLUMNS_FLAG, IGNORE_FLAG = "--columns", "--ignore_columns"

# Fields about a row, which say nothing that could be learned.
HARMLESS = frozenset(
    "id _id idx index uid uuid guid row_id sample_id example_id prompt_id question_id conversation_id conv_id "
    "session_id dialogue_id dialog_id message_id turn_id parent_id parent_message_id thread_id user_id file_name "
    "filename path source sources src origin origins dataset dataset_name _dataset_name subset split url urls link "
    "author authors contributor generator model model_name license licence copyright hash md5 sha1 sha256 version "
    "category categories subcategory topic topics domain subject field genre tag tags labels_metadata keywords title "
    "task tasks task_type task_name task_id type kind format language lang locale country difficulty level quality "
    "score scores rating ratings grade toxicity toxic openai_moderation redacted moderation language_score "
    "metadata meta info extra_info additional_info annotations annotator annotation_id comment comments note notes "
    "created created_at create_time updated_at update_time date datetime time timestamp tstamp year "
    "num_turns turn n_turns round rounds num_tokens n_tokens token_count tokens length len char_count word_count "
    "parallel_tool_calls tool_choice markdown cache_control finish_reason stop_reason usage "
    "__index_level_0__".split()
)

_PREFERENCE = (
    "these are preference rows (DPO), and training here is supervised: to learn the preferred replies alone, write "
    f"them as the last turn, or name a field of texts with {COLUMNS_FLAG} output=chosen and leave the other out with "
    f"{IGNORE_FLAG} rejected"
)
_JUDGED = (
    "a judgement of a reply (KTO) is not learned from: keep the rows with good replies alone, and leave the field out "
    f"with {IGNORE_FLAG}"
)
_TEXT_ONLY = "rows are trained as text alone: leave such rows out"
_TOKENS = "rows are tokenised here: give their text"

# Fields that would change what is learned -> what to do instead. Any other unknown field is refused as well.
_REMEDIES = {
    **dict.fromkeys(("chosen", "rejected", "chosen_response", "rejected_response", "winner", "better"), _PREFERENCE),
    **dict.fromkeys(("chosen_messages", "rejected_messages", "preference"), _PREFERENCE),
    **dict.fromkeys(("score_chosen", "score_rejected"), _PREFERENCE),
    "label": f"{_JUDGED} label (for a classifier set task_type in --lora_config)",
    "kto_tag": f"{_JUDGED} kto_tag",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios", "objects"), _TEXT_ONLY),
    **dict.fromkeys(("input_ids", "attention_mask", "labels", "token_ids", "position_ids"), _TOKENS),
    "context": f"where it belongs to the question, say so with {COLUMNS_FLAG} input=context",
    "segments": "write the turns as messages, those that are not to be learned with train: false",
    "train_detail": "masks within a turn are not supported: split the turn, or write train: false",
    "training_detail": "masks within a turn are not supported: split the turn, or write train: false",
    "refusal": "write it into the content",
}
REMEDIES = MappingProxyType(_REMEDIES)


@dataclass(frozen=True)
class FieldNames:
    """The user's word on the names of fields.

    columns  our name of a field by the user's: {"reply": "output"}
    ignored  names that are left out
    flags    whether the command has --columns and --ignore_columns, so that a hint may name them
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    flags: bool = True


def empty(value: Any) -> bool:
    """Return whether a field says nothing: None, or an empty text, list or object. False and 0 say something."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def json_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    for kinds, name in ((str, "string"), ((int, float), "number"), (list, "list"), (dict, "object")):
        if isinstance(value, kinds):
            return name
    return type(value).__name__


def shown(name: Any) -> str:
    """Return a field's name as it can be printed, at most 40 characters of it."""
    return str(name)[:40].encode("utf-8", "backslashreplace").decode("utf-8")


def names_of(fields: Iterable[str]) -> str:
    """Return field names for a message, no more than eight of them."""
    names = [shown(name) for name in fields]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"


class Fields:
    """The fields of one object of a row.

    values  the object; the user's names are replaced by ours
    place   names the object in a message, such as "data.json row 17: message 2"
    level   names its kind in the list of fields that are not read, such as "messages[]."
    seen    counts what the user's names and the harmless ones were met
    """

    def __init__(self, values: Mapping[str, Any], place: str, level: str, names: FieldNames, seen: Counter[str]):
        self.place, self.level, self.seen, self.names = place, level, seen, names
        self._left: dict[str, Any] = {}
        for name, value in values.items():
            if name in names.ignored:
                seen[f"ignored {name}"] += 1
                self.note(name, value)
                continue
            ours = names.columns.get(name, name)
            if ours is not name and ours != name:
                seen[f"column {name}"] += 1
                if not empty(values.get(ours)) and ours not in names.columns:
                    raise UserError(
                        f"{place}: {COLUMNS_FLAG} {ours}={name}, but the row has a field {ours} beside {name}",
                        f"leave it out with {IGNORE_FLAG} {ours} or take another name",
                    )
            if ours not in self._left or empty(self._left[ours]):
                self._left[ours] = value

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def present(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that are there and were not taken, even where they say nothing."""
        return [name for name in names if name in self._left]

    def peek(self, name: str) -> Any:
        """Return the value of a field without taking it."""
        return self._left.get(name)

    def left(self) -> list[str]:
        """Return the names that were not taken."""
        return list(self._left)

    def take(self, *names: str) -> Any:
        """Return the value of the one of `names` that says something, else None. UserError where two do."""
        found = self.take_named(*names)
        return None if found is None else found[1]

    def take_named(self, *names: str) -> tuple[str, Any] | None:
        """Return what `take` does, with the name."""
        if self._left.keys().isdisjoint(names):
            return None
        found = [(name, self._left[name]) for name in names if not empty(self._left.get(name))]
        if len(found) > 1:
            both = " and ".join(name for name, _ in found)
            raise UserError(
                f"{self.place}: {both} stand for the same thing",
                f"keep one, or leave the others out with {IGNORE_FLAG}" if self.names.flags else "keep one",
            )
        for name in names:
            self._left.pop(name, None)
        return found[0] if found else None

    def refuse_known(self) -> None:
        """Raise UserError for a field that is known to be of another kind of rows."""
        for name, value in self._left.items():
            if name in REMEDIES and not empty(value):
                raise self._refused(name)

    def _refused(self, name: str) -> UserError:
        other = f"give it a name that is read with {COLUMNS_FLAG}, or leave it out with {IGNORE_FLAG} {shown(name)}"
        remedy = REMEDIES.get(name, other)
        if not self.names.flags and (COLUMNS_FLAG in remedy or IGNORE_FLAG in remedy):
            remedy = "take it out of the row"
        return UserError(f"{self.place}: field {shown(name)} is not read", remedy)

    def finish(self, said: Iterable[str] = ()) -> None:
        """Raise UserError for a field that was not taken and is not known to be harmless; count the harmless ones.

        said  texts that were read: a field that only repeats one of them is harmless
        """
        said = set(said)
        for name, value in self._left.items():
            if empty(value):
                continue
            if name in HARMLESS or (isinstance(value, str) and value in said):
                self.note(name, value)
                continue
            raise self._refused(name)

    def note(self, name: str, value: Any) -> None:
        """Count a field that may not be learned."""
        if not empty(value):
            self.seen[f"field {self.level}{shown(name)}"] += 1
