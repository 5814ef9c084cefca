"""Rotary positions: the config's fields in one form, the frequencies they mean, and tables of cos and sin."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from megalora.batch import to_device
from megalora.errors import UserError
from megalora.models.bounds import Bound, Each, Flag, Number
from megalora.models.spec import Rotary

# Rope types, with the fields that each reads besides rope_type and rope_theta.
FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
        "truncate".split()
    ),
    "proportional": frozenset({"factor"}),
    "longrope": frozenset("factor original_max_position_embeddings attention_factor short_factor long_factor".split()),
}
_FACTOR = Number(False, 1e-6, 1e6)
_FACTORS = Each(_FACTOR, 1 << 13)  # of as many numbers as pairs of features
_BOUNDS: Mapping[str, Bound] = {
    "rope_theta": Number(False, 1e-3, 1e15),
    "original_max_position_embeddings": Number(False, 1, 1 << 32),
    "partial_rotary_factor": Number(False, 1e-4, 1.0),
    "truncate": Flag(),
    "llama_4_scaling_beta": Number(False, 0.0, 1e6),
}
_LISTS = ("short_factor", "long_factor")
_OTHER_NAMES = {"su": "longrope", "deepseek_yarn": "yarn"}  # of rope types, in older files
CONFIG_FIELDS = ("rope_parameters", "rope_theta", "rope_scaling")
_PARTIAL = "partial_rotary_factor"


def read_rope(
    raw: Mapping[str, Any],
    aliases: Mapping[str, str],
    partial: float | None,
    where: str,
    theta: float = 10000.0,
    reads: Collection[str] = (),
    harmless: Collection[str] = (),
) -> dict[str, Any]:
    """Return the rotary fields in one form, from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old).

    aliases  other names of the fields in this family's config.json
    partial  the family's default of partial_rotary_factor, the share of a head that rotates; None: all of it always
    theta    the family's default of rope_theta
    reads, harmless  fields that the family reads itself, and those that have no effect in it
    Raises UserError for a rope type or field that is not implemented, or a value out of range.
    """
    raw = _in_our_names(raw, aliases, where)
    _refuse_other_layers(raw.get("rope_parameters"), where)
    raw = {**raw, "rope_parameters": of_layers(raw.get("rope_parameters"), "full_attention")}
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    _refuse_two(raw, where)
    given = new if new is not None else old if old is not None else {}
    if not isinstance(given, Mapping):
        raise UserError(
            f"{where}: rope_{'parameters' if new is not None else 'scaling'} is not an object", "correct it"
        )
    fields = dict(given)
    for name in ("rope_theta", _PARTIAL, "original_max_position_embeddings"):
        inner = f"{'rope_parameters' if new is not None else 'rope_scaling'}.{name}"
        _refuse_differing({name: raw.get(name), inner: fields.get(name)}, where)
    kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields["rope_type"] = _OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    fields.pop("type", None)
    fields.setdefault("rope_theta", raw.get("rope_theta", theta))
    if partial is not None:
        fields.setdefault(_PARTIAL, raw.get(_PARTIAL, partial))
        _check_field(fields, _PARTIAL, where)
    _check_field(fields, "rope_theta", where)
    kind = fields["rope_type"]
    if not isinstance(kind, str) or kind not in FIELDS:
        raise UserError(
            f"{where}: rope_type = {kind!r} is not implemented", f"take a model with one of {', '.join(FIELDS)}"
        )
    if fields.get("attn_factor") is not None:
        raise UserError(
            f"{where}: rope field 'attn_factor' is not one that transformers reads, and it computes the model without "
            "it",
            "remove it to train the model as transformers does, or rename it to attention_factor to apply it",
        )
    checked = FIELDS[kind].union(reads)
    known = {*checked, *harmless, "rope_type", "rope_theta"} | ({_PARTIAL} if partial is not None else set())
    for name, value in fields.items():
        if value is not None and name not in known:
            raise UserError(
                f"{where}: rope field {name!r} = {value!r} is not known for rope_type {kind!r} and may change the "
                "numbers",
                "remove it if it does not",
            )
        if name in checked and name not in _LISTS and value is not None:
            _check_field(fields, name, where)
    if kind == "longrope":
        _complete_longrope(fields, raw, where)
    return fields


def _in_our_names(raw: Mapping[str, Any], aliases: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return the fields by our names. Raises UserError where two names of one field have different values."""
    found: dict[str, Any] = {name: value for name, value in raw.items() if name not in aliases}
    for name, value in raw.items():
        ours = aliases.get(name, name)
        _refuse_differing({name: value, ours: found.get(ours)}, where)
        if found.get(ours) is None:
            found[ours] = value
    return found


def _refuse_differing(values: Mapping[str, Any], where: str) -> None:
    """Raise UserError where these names of one field have different values."""
    given = {name: value for name, value in values.items() if value is not None}
    first = next(iter(given.values()), None)
    if any(value is not first and value != first for value in given.values()):  # a NaN is not equal to itself
        both = " and ".join(f"{name} = {value!r}" for name, value in given.items())
        raise UserError(f"{where}: {both} are one field", "keep one of them")


def _refuse_other_layers(fields: Any, where: str) -> None:
    """Raise UserError where `rope_parameters` has, beside a part for each type of layer, one that no layer reads."""
    kinds = ("full_attention", "sliding_attention")
    if isinstance(fields, Mapping) and "full_attention" in fields:
        for name, value in fields.items():
            if name not in kinds and value is not None:
                raise UserError(
                    f"{where}: rope_parameters has {name!r} beside the types of layers: only {' and '.join(kinds)} are "
                    f"read there",
                    "remove it, or write it into these",
                )


def of_layers(fields: Any, kind: str) -> Any:
    """Return the part of `rope_parameters` for layers of that type, where it has one for each type; else all of it."""
    if isinstance(fields, Mapping) and kind in fields:
        return fields[kind]
    return fields


def read_sliding_rope(
    raw: Mapping[str, Any], theta: tuple[str, float] | None, partial: float | None, where: str
) -> dict[str, Any] | None:
    """Return the rotary fields of layers whose window slides, where they are others than those of full attention.

    theta  the field with their rope_theta in the old form, and its default; they are not scaled.
           None: as full attention
    """
    new = raw.get("rope_parameters")
    if isinstance(new, Mapping) and "sliding_attention" in new:
        own = new["sliding_attention"]
        if theta is not None and theta[0] != "rope_theta" and isinstance(own, Mapping):
            inner = "rope_parameters.sliding_attention.rope_theta"
            _refuse_differing({theta[0]: raw.get(theta[0]), inner: own.get("rope_theta")}, where)
        return read_rope({"rope_parameters": new["sliding_attention"]}, {}, partial, where, theta[1] if theta else 1e4)
    if theta is None:
        return None
    flat = new.get("rope_theta") if isinstance(new, Mapping) and theta[0] == "rope_theta" else None
    value = raw.get(theta[0])
    return read_rope({"rope_theta": flat or (theta[1] if value is None else value)}, {}, partial, where)


def _complete_longrope(fields: dict[str, Any], raw: Mapping[str, Any], where: str) -> None:
    """Add what older files have outside the rope fields, and check the lists. Raises UserError."""
    name = "original_max_position_embeddings"
    if fields.get(name) is None:
        fields[name] = raw.get(name)
    if fields[name] is None:
        raise UserError(f"{where}: rope_type longrope without {name}", "take config.json from the model's own folder")
    _check_field(fields, name, where)
    for name in _LISTS:
        if not _FACTORS.allows(fields.get(name)):
            raise UserError(f"{where}: {name} of longrope is not valid", f"give {_FACTORS.told}")


def _refuse_two(raw: Mapping[str, Any], where: str) -> None:
    """Raise UserError where the new form and the old one are both there and say different things."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    if not isinstance(new, Mapping) or not isinstance(old, Mapping):
        return

    def plain(fields: Mapping[str, Any]) -> dict[str, Any]:
        kind = {"rope_type": fields.get("rope_type") or fields.get("type") or "default"}
        return {k: v for k, v in fields.items() if k not in ("type", "rope_theta") and v is not None} | kind

    if plain(new) != plain(old):
        raise UserError(
            f"{where}: rope_parameters = {dict(new)!r} and rope_scaling = {dict(old)!r} say different things, and "
            "versions of transformers differ in which they read",
            "keep one of them (write the fields of rope_scaling into rope_parameters, beside rope_theta)",
        )


def extended_length(rope: Mapping[str, Any], max_position_embeddings: int) -> int:
    """Return the tokens of the longest document that scaled rotations reach: original * factor (YaRN, linear)."""
    if rope["rope_type"] not in ("yarn", "linear"):
        return max_position_embeddings
    original = rope.get("original_max_position_embeddings") or max_position_embeddings
    return max(max_position_embeddings, int(original * (rope.get("factor") or 1.0)))


def _check_field(fields: Mapping[str, Any], name: str, where: str) -> None:
    bound = _BOUNDS.get(name, _FACTOR)
    if not bound.allows(fields[name]):
        raise UserError(f"{where}: {name} = {fields[name]!r:.200} is not valid", f"give {bound.told}")


def rotary(
    rope: Mapping[str, Any], head_dim: int, max_position_embeddings: int | None, where: str, interleaved: bool = False
) -> Rotary:
    """Return the rotation that `rope` (of `read_rope`) means for heads of `head_dim` features.

    max_position_embeddings  of the config, which formulas of scaled frequencies read
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rope["rope_type"]
    if kind == "proportional":
        return _proportional(rope, head_dim, interleaved)
    if kind in ("default", "dynamic"):
        size = int(head_dim * rope.get(_PARTIAL, 1.0))
        if size % 2 or size < 2:
            raise UserError(
                f"{where}: {size} of {head_dim} features of a head would rotate, which is no even number",
                "correct the config",
            )
        found = plain(size, rope["rope_theta"], interleaved)
        return replace(found, only_to=_unscaled_length(rope, max_position_embeddings, where))
    config = SimpleNamespace(  # what transformers' formulas read of a config: version 4 the old form, 5 the new one
        rope_parameters=rope, rope_scaling=rope, rope_theta=rope["rope_theta"], head_dim=head_dim, hidden_size=head_dim,
        num_attention_heads=1, partial_rotary_factor=rope.get(_PARTIAL, 1.0), standardize_rope_params=lambda: None,
        max_position_embeddings=max_position_embeddings,
    )  # fmt: skip
    try:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        found = Rotary(tuple(frequencies.tolist()), float(factor), interleaved)
        pairs = int(head_dim * rope.get(_PARTIAL, 1.0)) // 2
        if not frequencies.isfinite().all() or not math.isfinite(found.factor):
            raise ValueError("a frequency that is not finite")
        if any(len(rope[name]) != pairs for name in _LISTS if name in FIELDS[kind]):  # torch would repeat a single one
            raise ValueError(f"a list of other than {pairs} factors")
        if kind != "longrope":
            return found
        original = int(rope["original_max_position_embeddings"])
        long = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=original + 1)[0]
        return replace(found, long=tuple(long.tolist()), long_from=original)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, RuntimeError) as error:
        raise UserError(f"{where}: rope fields {dict(rope)}: {error!r} is missing or wrong", "correct it") from None


def _proportional(rope: Mapping[str, Any], head_dim: int, interleaved: bool) -> Rotary:
    """Return the rotation of a whole head in whose frequencies the last, all but a share, are 0 (gemma4)."""
    turns = int(rope.get(_PARTIAL, 1.0) * head_dim // 2)
    exponents = torch.arange(0, 2 * turns, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope["rope_theta"] ** exponents) / (rope.get("factor") or 1.0)
    return Rotary((*frequencies.tolist(), *[0.0] * (head_dim // 2 - turns)), interleaved=interleaved)


def _unscaled_length(rope: Mapping[str, Any], max_position_embeddings: int | None, where: str) -> int | None:
    """Return the tokens up to which rope type dynamic changes nothing; None for one that never does."""
    if rope["rope_type"] != "dynamic":
        return None
    if rope.get("factor") is None or max_position_embeddings is None:
        missing = "factor" if rope.get("factor") is None else "max_position_embeddings"
        raise UserError(f"{where}: rope_type dynamic without {missing}", "take config.json from the model's own folder")
    return max_position_embeddings


def plain(size: int, theta: float, interleaved: bool = False) -> Rotary:
    """Return the rotation of the first `size` features of a head, pair j by theta ** (-2 j / size) a position."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    return Rotary(tuple((1.0 / (theta**exponents)).tolist()), interleaved=interleaved)


def rope_table(
    position: Rotary, position_ids: torch.Tensor, dtype: torch.dtype, bounds: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cos, sin) [F, n / 2] of positions [F]; angles in float32, as HF computes them.

    bounds  cumulative bounds of the documents in F: longrope has other frequencies for long ones
    """
    device = position_ids.device
    frequencies = to_device(torch.tensor(position.inverse_frequencies, dtype=torch.float32), device)
    if position.long is not None:
        lengths = torch.tensor(bounds[1:]) - torch.tensor(bounds[:-1])
        is_long = to_device((lengths > position.long_from).repeat_interleave(lengths), device)
        long = to_device(torch.tensor(position.long, dtype=torch.float32), device)
        frequencies = torch.where(is_long.unsqueeze(-1), long, frequencies)
    angles = position_ids.to(torch.float32).unsqueeze(-1) * frequencies
    return (angles.cos() * position.factor).to(dtype), (angles.sin() * position.factor).to(dtype)
