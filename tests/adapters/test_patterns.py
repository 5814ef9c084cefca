"""Regular expressions and numbers of a stranger's lora_config.json: within a time, a length and a range, or a line."""

import re

import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from megalora.adapters import patterns
from megalora.adapters.config import LoraConfig
from megalora.adapters.patterns import Patterns, check_pattern, named
from megalora.errors import UserError

NAMES = [f"model.layers.{layer}.{block}" for layer in (0, 1, 11) for block in ("self_attn.q_proj", "mlp.up_proj")]
LINEARS = {name: int(name.split(".")[2]) for name in NAMES}
WITHOUT_END = ["(m+)+x", "((.|..)+)+!", "(?:(m|mm)+)+[!x]", "(model|mode|l|\\.|layers|.)*$x"]  # not all, for `regex`


@pytest.mark.parametrize("pattern", WITHOUT_END)
def test_an_expression_that_does_not_end(pattern, monkeypatch):
    """As target, as excluded, as the name of another rank; where it ends after all, it matches nothing."""
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.02)
    long = {f"{'m' * 40}.!x_proj": 0, "model.layers.1.q_proj": 1}
    for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        fields = {"target_modules": ["q_proj", "!x_proj"], field: {pattern: 4} if "pattern" in field else pattern}
        try:
            found = LoraConfig.from_dict(fields).resolve("llama", long)
            assert (pattern, field) != (WITHOUT_END[1], "target_modules") and len(found.adapters) <= 2
        except UserError as error:
            assert re.search("takes too long to match|matches no linear", str(error))


def test_all_matches_of_a_config_have_one_limit(monkeypatch):
    monkeypatch.setattr(patterns, "ALL_SECONDS", -1.0)
    with pytest.raises(UserError, match="takes too long"):
        Patterns().fits(WITHOUT_END[1], f"{'m' * 60}.!_proj")


@pytest.mark.parametrize(
    "pattern",
    ["(" * 200_000, "(" * 5000, "((a{1000}){1000}){1000}", "a{99999999999999999999}", "a" * 20_000, "[", "(?P<a>", 3],
    ids=lambda pattern: str(pattern)[:8],
)
def test_what_is_no_expression_or_too_long_is_refused(pattern):
    with pytest.raises(UserError, match="^lora_config: .* is (not a|too long a) regular expression") as error:
        check_pattern(pattern, "lora_config: target_modules")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "layers_to_transform"])
@pytest.mark.parametrize("value", [10**12, 10**400, float("inf"), float("nan"), -1, 0.5, [10**9], [0] * 5000, "8"])
def test_numbers_have_bounds(name, value):
    value = {"q_proj": value} if name.endswith("pattern") else value
    if value == {"q_proj": 0.5} or value == 0.5:
        value = [value]
    with pytest.raises(UserError, match=rf"^lora_config: {name} = .*is not valid: give") as error:
        LoraConfig.from_dict({name: value})
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("value", [5, [[1]], [{}], "classifier", {"a": 1}, None])
def test_modules_to_save_of_a_classifier(value):
    try:
        LoraConfig.from_dict({"task_type": "SEQ_CLS", "modules_to_save": value})
    except UserError as error:
        assert "modules_to_save" in str(error)


@examples(50)
@given(pattern=st.text(alphabet="qupj_.*+?|()[]\\d1{},^$", max_size=12), data=st.data())
def test_expressions_match_as_pefts(pattern, data):
    """By `re`, at the end of a name behind a dot, as peft reads rank_pattern; and whole, as it reads targets."""
    name = data.draw(st.sampled_from(NAMES))
    try:
        check_pattern(pattern, "it")
        expected = re.match(rf"(.*\.)?({pattern})$", name), re.fullmatch(pattern, name)
    except (UserError, re.error):
        return
    assert Patterns().fits_end(pattern, name) == (expected[0] is not None)
    assert Patterns().fits(pattern, name) == (expected[1] is not None)


def test_names_in_a_list_match_at_dots():
    assert named(NAMES, ["q_proj", "layers.1.mlp.up_proj"]) == [n for n in NAMES if "q_" in n or n == NAMES[3]]
    assert named(NAMES, ["proj", "odel.layers.0.mlp.up_proj", ""]) == []
    many = [f"model.layers.{layer}.mlp.experts.{e}.up_proj" for layer in range(60) for e in range(256)]
    config = LoraConfig.from_dict({"target_modules": many})
    assert len(config.resolve("llama", dict.fromkeys(many, 0)).adapters) == len(many)  # not their product
