"""A model family: how its config.json is read into a ModelSpec, and which fields that accounts for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from megalora.errors import UserError
from megalora.models import rotary
from megalora.models.bounds import BOUNDS, OPTIONAL, Flag, Object
from megalora.models.spec import FileNames, ModelSpec, Rotary
from megalora.ops.activations import ACTIVATIONS


@dataclass(frozen=True)
class Family:
    """Model types whose configs `read` turns into a spec.

    types        the values of model_type
    read         config -> ModelSpec; it may read the fields of `reads` and no other
    reads        names of fields
    fixed        fields with the one value that is implemented
    harmless     fields that say nothing about the numbers of a training step, beside those that no family reads
    rope         other names of rope fields in this family's config.json -> `rope_parameters`' own
    rope_reads   rope fields that `read` reads (Fields.rope) beside those of the rope types
    rope_harmless  rope fields that have no effect in this family
    theta        the default of rope_theta
    rotates      its config class has rope fields
    scaled       its models are made with scaled rotations: a config.json that does not say how is refused
    rope_default the rope_parameters of a config.json that has none
    generates    its models write text; else they are for classifiers alone
    partial      the default of partial_rotary_factor where the family has that field; two names of fields: their ratio,
                 or 1 where the config has not the first
    sliding_theta  of layers whose window slides: the field with their rope_theta, and its default; None: as the others
    files        how names in its files differ from ours
    example      what transformers' default config lacks to be a model, for docs/models.md
    aliases      other names of fields in this family's config.json -> those that `read` uses
    config_class the model_type whose config class in transformers has the defaults; None: the family's own
    defaults     of fields where they differ from that class
    remote       config.json names code that transformers lacks: `defaults` are all of its fields. No such code is run
    optional     sizes that config.json may leave out
    architectures  ends of names in config.json's `architectures` beside those that every decoder may have
    inner        of a model around a language model: the types that its text_config may have -> the families' own
    flat         of such a model: old files have the fields of text_config beside it
    published    names of published models whose config.json the tests read (tests/models)
    refused      published models of these types that are refused -> why
    A field of the family's config class that is none of these is refused, unless it is unset.
    """

    types: tuple[str, ...]
    read: Callable[[Fields], ModelSpec]
    reads: frozenset[str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    rope: Mapping[str, str] = field(default_factory=dict)
    rope_reads: frozenset[str] = frozenset()
    rope_harmless: frozenset[str] = frozenset()
    theta: float = 10000.0
    rotates: bool = True
    scaled: bool = False
    rope_default: Mapping[str, Any] | None = None
    generates: bool = True
    partial: float | tuple[str, str] | None = None
    sliding_theta: tuple[str, float] | None = None
    files: FileNames = field(default_factory=FileNames)
    example: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    config_class: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    remote: bool = False
    optional: frozenset[str] = frozenset()
    architectures: frozenset[str] = frozenset()
    inner: Mapping[str, str] = field(default_factory=dict)
    flat: bool = False
    published: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def in_our_names(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the fields of a config.json under the names that `read` uses.

        Raises UserError where two names of one field have different values.
        """
        found: dict[str, Any] = {}
        for name, value in raw.items():
            ours = self.aliases.get(name, name)
            if found.get(ours) is not None and value is not None and found[ours] != value:
                both = f"{name} = {value!r} and {ours} = {found[ours]!r}"
                raise UserError(f"{where}: {both} are one field", "keep one of them")
            found[ours] = value if found.get(ours) is None else found[ours]
        return found

    def partial_of(self, raw: Mapping[str, Any], where: str) -> float | None:
        """Return the default of partial_rotary_factor with these fields of a config.json. Raises UserError."""
        if not isinstance(self.partial, tuple):
            return self.partial
        part, whole = self.partial
        if raw.get(part) is None:
            return 1.0
        for name in self.partial:
            check_field(name, raw.get(name), where)
        if raw.get(whole) is None:
            raise UserError(f"{where}: {part} without {whole}", "take config.json from the model's own folder")
        return raw[part] / raw[whole]


class RemoteConfig:
    """The config of a model that transformers lacks: the fields that its family declares, and those of the file."""

    def __init__(self, defaults: Mapping[str, Any], given: Mapping[str, Any]):
        self._fields = {**defaults, **given}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.__dict__.get("_fields", ()):
            raise AttributeError(name)
        return self._fields[name]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as transformers' config objects do."""
        return dict(self._fields)


class Fields:
    """The fields of a config.json that a family declares, with transformers' defaults, checked as they are read.

    Raises UserError, naming file and field, for a value that is missing or out of range.
    """

    def __init__(
        self,
        hf: Any,
        family: Family,
        rope: Mapping[str, Any],
        where: str,
        sliding_rope: Mapping[str, Any] | None = None,
    ):
        self._hf, self._family, self._rope, self._where = hf, family, rope, where
        self._sliding_rope = sliding_rope
        self._rotaries: dict[tuple[int, bool, bool, float | None], Rotary] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._family.reads:
            raise AssertionError(f"{self._family.types[0]} reads {name}, which it does not declare")
        value = getattr(self._hf, name, None)
        if isinstance(BOUNDS.get(name), Object) and hasattr(value, "to_diff_dict"):  # a config within the config
            value = value.to_diff_dict()
        check_field(name, value, self._where)
        optional = name in OPTIONAL or name in self._family.optional or isinstance(BOUNDS[name], Flag)
        if value is None and not optional:
            self.fail(f"{name} is missing", "take config.json from the model's own folder")
        return value

    @property
    def where(self) -> str:
        """The file that they are from."""
        return self._where

    def fail(self, message: str, hint: str | None = None) -> None:
        """Raise UserError about this config."""
        raise UserError(f"{self._where}: {message}", hint)

    def rotary(
        self, head_dim: int, *, sliding: bool = False, interleaved: bool = False, theta: float | None = None
    ) -> Rotary:
        """Return the rotation of heads of `head_dim` features.

        sliding      in a layer whose window slides, where these have frequencies of their own
        interleaved  neighbouring features are a pair, see Rotary
        theta        of a layer that has its own; None: rope_theta
        """
        key = head_dim, sliding and self._sliding_rope is not None, interleaved, theta
        if key not in self._rotaries:
            rope = self._sliding_rope if key[1] else self._rope
            rope = rope if theta is None else {**rope, "rope_theta": theta}
            longest = getattr(self._hf, "max_position_embeddings", None)
            self._rotaries[key] = rotary.rotary(rope, head_dim, longest, self._where, interleaved)
        return self._rotaries[key]

    @property
    def rope(self) -> Mapping[str, Any]:
        """The rope fields, in one form (see megalora.models.rotary.read_rope)."""
        return self._rope

    def activation_of(self, name: str) -> str:
        """Return the activation that field `name` names. Raises UserError for one that is not implemented."""
        value = getattr(self, name)
        if value not in ACTIVATIONS:
            self.fail(f"{name} = {value!r} is not implemented", f"take a model with one of {', '.join(ACTIVATIONS)}")
        return value

    def nested(
        self, name: str, defaults: Mapping[str, Any], fixed: Mapping[str, Any], harmless: Collection[str]
    ) -> Any:
        """Return the object in field `name` that has fields itself: these as attributes.

        defaults  those that are read; fixed: those that have one value that is implemented
        Raises UserError for any other field that is set, unless it is `harmless`.
        """
        from transformers import PretrainedConfig

        general = set(PretrainedConfig().to_dict())  # which transformers writes into every object that is a config
        given = getattr(self, name) or {}
        if not isinstance(given, Mapping):
            self.fail(f"{name} is not an object", "correct it")
        for own, value in given.items():
            if own in fixed and value != fixed[own]:
                self.fail(f"{name}.{own} = {value!r} is not implemented", f"take a model with {own} = {fixed[own]!r}")
            known = own in fixed or own in defaults or own in harmless or own in general or own.startswith("_")
            if not known and value not in (None, False, "", [], {}):
                self.fail(
                    f"{name}.{own} = {value!r} is not read and may change the numbers", "remove it if it does not"
                )
            if own in defaults:
                check_field(f"{name}.{own}", value, self._where)
                if value is None and f"{name}.{own}" not in OPTIONAL:
                    self.fail(f"{name}.{own} is missing", "take config.json from the model's own folder")
        return SimpleNamespace(**{**defaults, **{own: value for own, value in given.items() if own in defaults}})

    def reads(self, name: str) -> bool:
        """Return whether the family declares the field."""
        return name in self._family.reads


def check_field(name: str, value: Any, where: str, written: str | None = None) -> None:
    """Raise UserError for a value that a field may not have, None apart; written: the field's name in that file."""
    bound = BOUNDS.get(name)
    if bound is None:
        raise AssertionError(f"field {name} has no bound: give it one in megalora/models/bounds.py")
    if value is not None and not bound.allows(value):
        raise UserError(f"{where}: {written or name} = {value!r:.200} is not valid", f"give {bound.told}")
