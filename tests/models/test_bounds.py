"""No field of a stranger's config.json is read without a bound, in any family; what is beyond one is a line."""

import math

import pytest
from fuzz import JSON, edited, examples, ours_only
from hypothesis import given
from hypothesis import strategies as st
from oracle import CLASSIC, ENCODERS, EXPERTS, FAMILIES, MODERN, fields_of

from megalora.errors import UserError
from megalora.models.bounds import BOUNDS, Each, Flag, Kinds, Number, NumberOr, Object, OneOrEach, Repeated, Word
from megalora.models.config import config_from_dict, known_families
from megalora.models.family import Family, Fields
from megalora.models.rotary import FIELDS as ROPE

ROWS = [*FAMILIES, *MODERN, *CLASSIC, *EXPERTS, *ENCODERS]
BY_TYPE = {fields_of(name)["model_type"]: fields_of(name) for name in ROWS}
BEYOND = {
    Number: [10**400, -2, math.nan, math.inf, -math.inf, True, "1", [1], {}, ""],
    NumberOr: [10**400, -2, math.nan, math.inf, True, "1", [1], {}, ""],
    Flag: [2, "no", [], {}, math.nan],
    Word: [1, [], {}, "x" * 101, True],
    Kinds: [1, {}, [1], [None], "x" * 101, ["x"] * 5000, True],
    Each: [1, "x", {}, [[]], [{}], [None], ["x"] * 5000, [math.nan], [10**400]],
    OneOrEach: ["x", {}, [[]], [None], [10**400], 0, math.nan, [0], True],
    Repeated: [1, [1], [[["a"]]], [[["a"], 10**9]], [[["a"] * 4000, 2]], [[["a"], "2"]], [[[1], 1]]],
    Object: [1, "x", [], True],
}


def test_every_field_that_a_family_reads_has_a_bound():
    for family in known_families().values():
        assert family.reads <= BOUNDS.keys(), (family.types, family.reads - BOUNDS.keys())
    bare = Family(("bare",), lambda hf: hf.new_number, reads=frozenset({"new_number"}))
    with pytest.raises(AssertionError, match="new_number has no bound: give it one in megalora/models/bounds.py"):
        bare.read(Fields(type("Config", (), {"new_number": 3})(), bare, {}, "config.json"))


@pytest.mark.parametrize("model_type", sorted(BY_TYPE))
def test_a_value_beyond_the_bound_is_a_line(model_type):
    """Whatever the field, and before transformers makes a list as long as it says."""
    family, raw = known_families()[model_type], BY_TYPE[model_type]
    spelt = {ours: theirs for theirs, ours in family.aliases.items()}
    for name in family.reads:
        written = spelt[name] if spelt.get(name) in raw else name
        for value in BEYOND[type(BOUNDS[name])]:
            with pytest.raises(UserError, match=rf"^config\.json: .*\b{name}\b.* is not valid: give ") as error:
                config_from_dict(raw | {written: value})
            assert len(str(error.value)) < 500
    if family.rotates and not raw.keys() & {"rope_scaling", "rope_parameters"}:
        for kind, fields in ROPE.items():
            for name in (*fields, "rope_theta"):
                rope = {"rope_type": kind, **dict.fromkeys(fields, 1.0)} | {name: 10**400}
                with pytest.raises(UserError, match=r"^config\.json: "):
                    config_from_dict(raw | {"rope_scaling": rope, "rope_theta": rope.get("rope_theta", 1e4)})


def read(raw):
    """The sizes hang together: the tensors can be listed and counted."""
    spec = config_from_dict(raw)
    assert all(size > 0 for shape in spec.tensors.values() for size in shape), raw
    assert spec.max_position_embeddings > 0 and all(mixer.linears for mixer in spec.mixers)


@pytest.mark.parametrize("model_type", sorted(BY_TYPE))
def test_a_field_that_is_null_or_zero(model_type):
    family, raw = known_families()[model_type], BY_TYPE[model_type]
    for name in family.reads:
        for value in (None, 0, 2**16):
            ours_only(lambda: read(raw | {name: value}))  # noqa: B023


def test_positions_behind_a_padding_token_that_leaves_none():
    raw = BY_TYPE["xlm-roberta"]
    with pytest.raises(UserError, match=r"pad_token_id \(65536\) leaves no row of max_position_embeddings"):
        config_from_dict(raw | {"pad_token_id": 2**16})


def test_what_would_be_a_list_without_end():
    for extra in ({"num_labels": 10**9}, {"num_hidden_layers": 10**9}, {"layer_types": ["full_attention"] * 10**5}):
        for model_type in ("qwen3", "gemma2", "gpt_neo"):
            ours_only(lambda: config_from_dict(BY_TYPE[model_type] | extra))  # noqa: B023


@examples(60)
@given(data=st.data())
def test_any_config(data):
    raw = BY_TYPE[data.draw(st.sampled_from(sorted(BY_TYPE)))]
    family = known_families()[raw["model_type"]]
    numbers = st.integers(-2, 70) | st.floats() | st.sampled_from([2**16, 2**40, True, None]) | JSON
    if data.draw(st.booleans()):
        raw = raw | data.draw(st.dictionaries(st.sampled_from(sorted(family.reads)), numbers, min_size=1, max_size=3))
    else:
        raw = data.draw(edited(raw))
    ours_only(lambda: read(raw if isinstance(raw, dict) else {}))
