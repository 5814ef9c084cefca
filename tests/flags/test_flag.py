"""One definition for each flag, and values within its limits."""

import pytest

from megalora.errors import UserError
from megalora.flags.flag import REQUIRED, Definition, Flag, flags_of
from megalora.flags.generation import GenerationArguments
from megalora.flags.parsing import FINETUNE_SECTIONS
from megalora.flags.tools import CONVERT_COMMANDS, DoctorArguments, PlanArguments
from megalora.flags.training import CompatibilityArguments

SECTIONS = {
    *FINETUNE_SECTIONS,
    GenerationArguments,
    PlanArguments,
    DoctorArguments,
    *(section for _, sections in CONVERT_COMMANDS.values() for section in sections),
}
# One name for different things: what a run of training and one of generation mean by it differs.
HOMONYMS = {
    "seed": "of the adapters, dropout and data; of the sampling",
    "seq_length": "of a row; of prompt and reply",
    "output_dir": "of a run; what the doctor looks at",
    "return_logits": "false in training; writes them in generation",
    "model_path": "a folder; plan takes a config.json alone too",
    "dry_run": "trains nothing; converts nothing",
    "dtype": "auto or one of four; plan counts for three",
}


def test_a_flag_of_several_sections_is_one_object():
    found: dict[str, set[Definition]] = {}
    for section in SECTIONS:
        for flag in flags_of(section):
            found.setdefault(flag.name, set()).add(flag.definition)
    assert {name for name, definitions in found.items() if len(definitions) > 1} == HOMONYMS.keys()


def test_every_help_is_one_plain_line():
    for section in SECTIONS:
        for flag in flags_of(section):
            assert (
                flag.help
                and flag.help.removesuffix("...")[-1] != "."
                and "\n" not in flag.help
                and "|" not in flag.help
            ), flag
            assert (flag.unset is None) != (flag.default is None), f"{flag.name}: a default of None says what it means"


def test_defaults_are_sound_values():
    for section in SECTIONS - {CompatibilityArguments}:
        for flag in flags_of(section):
            if not flag.required:
                flag.check(flag.default, flag.name)


def number(type=float, **limits) -> Flag:
    return Flag("x", type, False, False, REQUIRED, None, Definition("a number", **limits))


@pytest.mark.parametrize(
    ("flag", "bad", "good", "expected"),
    [
        (number(at_least=1), 0.5, 1.0, "a number of at least 1"),
        (number(above=0), 0, 0.1, "a number above 0"),
        (number(above=0, at_most=1), 1.5, 1, "a number above 0 and at most 1"),
        (number(at_least=0, below=1), 1, 0.0, "a number of at least 0 and below 1"),
        (number(int, at_most=5), 6, 5, "a whole number of at most 5"),
    ],
)
def test_bounds(flag, bad, good, expected):
    flag.check(good, "x")
    with pytest.raises(UserError) as caught:
        flag.check(bad, "x")
    assert (caught.value.message, caught.value.hint) == (f"x {bad} is out of range", f"give {expected}")


def test_paths_that_must_exist(tmp_path):
    flag = Flag("x", str, False, True, None, "none", Definition("a path", exists="a folder"))
    flag.check_exists(str(tmp_path))
    flag.check_exists(None)
    with pytest.raises(UserError, match=f"^x {tmp_path}/none does not exist: name a folder$"):
        flag.check_exists(f"{tmp_path}/none")
