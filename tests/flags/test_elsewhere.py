"""Flags that other programs have: each is one that is not ours, and leads to one that is."""

import pytest

from megalora.errors import UserError
from megalora.flags import FINETUNE_SECTIONS, GENERATE_SECTIONS, parse_finetune, parse_generate
from megalora.flags.elsewhere import FLAGS, LORA, advice
from megalora.flags.flag import table_of

OURS = table_of((*FINETUNE_SECTIONS, *GENERATE_SECTIONS))
NAMES = {name: ours for ours, names in FLAGS.items() for name in names.split()}


def test_the_tables_are_sound():
    assert set(FLAGS) <= set(OURS) and not set(NAMES) & set(OURS)
    assert sum(len(names.split()) for names in FLAGS.values()) == len(NAMES), "each name once"
    from megalora.adapters.config import LoraConfig

    assert set(LORA) <= set(LoraConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("parse", "flag", "says"),
    [
        (parse_finetune, "lora_r", """unknown flag --lora_r: r is a field of lora_config, a file or the fields: """),
        (parse_finetune, "lora_target", """--lora_config '{"target_modules": "all-linear"}'"""),
        (parse_finetune, "cutoff_len", "here it is --seq_length"),
        (parse_finetune, "lr", "here it is --learning_rate"),
        (parse_finetune, "resume", "leave it out: the same command again goes on from the newest checkpoint"),
        (parse_generate, "max_tokens", "here it is --max_new_tokens"),
    ],
)
def test_a_flag_of_another_program_leads_to_ours(parse, flag, says):
    with pytest.raises(UserError) as caught:
        parse([f"--{flag}", "8"])
    assert says in str(caught.value)


def test_nothing_is_said_of_what_a_command_does_not_take():
    assert advice("lora_r", {"seed"}) is None and advice("cutoff_len", {"seed"}) is None
    assert advice("learning_rat", OURS) is None
