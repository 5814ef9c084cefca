"""Dropout of the base: read from the config, switched off by the flag, a part of the run's identity."""

from __future__ import annotations

import pytest
import tiny
import torch
from oracle import fields_of
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megalora.errors import UserError
from megalora.models.config import config_from_dict
from megalora.models.dropouts import base_dropouts, choose_base_dropout, told

PDROP = {"attn_pdrop": 0.2, "embd_pdrop": 0.1, "resid_pdrop": 0.15}


def test_the_flag_decides():
    config = config_from_dict(fields_of("gpt2", **PDROP))
    assert told(base_dropouts(config)) == "embedding 0.1, residual 0.15, attention 0.2"
    assert choose_base_dropout(config, None) == choose_base_dropout(config, True) == config
    bare = choose_base_dropout(config, False)
    assert bare == config_from_dict(fields_of("gpt2")) and base_dropouts(bare) == {}


@pytest.mark.parametrize("wanted", [True, False])
def test_a_flag_without_effect_is_refused(wanted):
    with pytest.raises(UserError, match="base_dropout has no effect: .* gpt2 model"):
        choose_base_dropout(config_from_dict(fields_of("gpt2")), wanted)


def test_runs_with_and_without_are_other_runs(tmp_path):
    fields = fields_of("gpt2", vocab_size=320, num_hidden_layers=2, **PDROP)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](**fields))
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    inputs = tiny.Inputs(
        tmp_path / "model",
        tiny.write_json(tmp_path / "rows.json", tiny.questions(8)),
        tiny.write_json(tmp_path / "lora.json", tiny.LORA),
    )
    out = tmp_path / "run"
    commands = [
        inputs.flags(tmp_path / "off", max_steps=2, base_dropout=False),
        inputs.flags(out, max_steps=2),
        inputs.flags(out, max_steps=4, base_dropout=False),
    ]
    off, on, other = tiny.run(0, 1, commands)
    assert off.status == on.status == 0, off.err + on.err
    assert "embedding 0.1, residual 0.15, attention 0.2" in on.out and "dropout of the base" not in off.out
    assert tiny.column(tmp_path / "off", "loss") != tiny.column(out, "loss")
    assert other.status != 0 and "base dropout" in other.err
    losses = torch.tensor(tiny.column(out, "loss"))
    assert losses.isfinite().all()
