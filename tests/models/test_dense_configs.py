"""Published llama, mistral, qwen2 and qwen3 configs: a tiny copy has transformers' logits, or there is a reason."""

import json

import pytest
import torch
import transformers
from dense_configs import CONFIGS, REFUSED
from oracle import whole_tensor
from variants import in_float64

from megalora.errors import UserError
from megalora.models.config import config_from_dict
from megalora.models.inputs import Inputs, rope_tables
from megalora.models.stage import NO_LORA, Stage
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement, Tokens

LAYERS, HEAD_DIM, WINDOW = 3, 8, 5
IDS = torch.randint(0, 64, (24,), generator=torch.Generator().manual_seed(5))


def tiny(raw: dict) -> dict:
    """The same fields, with small sizes in the same relations: shares of heads, a width of its own, windows."""
    group = min(raw["num_attention_heads"] // raw["num_key_value_heads"], 4)
    kv = 2 if group < raw["num_attention_heads"] else 1
    small = dict(raw)
    small |= {"num_key_value_heads": kv, "num_attention_heads": kv * group, "hidden_size": kv * group * HEAD_DIM}
    if "head_dim" in raw:
        own = raw["head_dim"] * raw["num_attention_heads"] != raw["hidden_size"]
        small |= {"head_dim": HEAD_DIM, "hidden_size": small["hidden_size"] + (8 if own else 0)}
    small |= {"intermediate_size": 24, "num_hidden_layers": LAYERS, "vocab_size": 64}
    small |= {name: 0 for name in ("pad_token_id", "bos_token_id", "eos_token_id") if raw.get(name) is not None}
    if raw.get("sliding_window") is not None:
        small["sliding_window"] = WINDOW
    if "max_window_layers" in raw:
        small["max_window_layers"] = 1 if raw["max_window_layers"] < raw["num_hidden_layers"] else LAYERS
    return small


@torch.no_grad()
def difference(raw: dict) -> float:
    """The largest between transformers' logits, in float64, and ours."""
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    kind = transformers.CONFIG_MAPPING[raw["model_type"]](**json.loads(json.dumps(fields)))
    theirs = transformers.AutoModelForCausalLM.from_config(kind, attn_implementation="sdpa")
    in_float64(theirs)
    theirs = theirs.double().eval()
    for name, parameter in theirs.named_parameters():
        parameter.copy_(whole_tensor(name, tuple(parameter.shape), 0.15))
    config = config_from_dict(raw)
    stage = Stage(config, range(LAYERS), Placement(Axis(), False, torch.float64, "cpu"), NO_LORA)
    for name, parameter in stage.named_parameters():
        parameter.copy_(whole_tensor(name, tuple(parameter.shape), 0.15))
    stage.refresh_adapters()
    index = torch.arange(len(IDS))
    bounds, tokens = (0, len(IDS)), Tokens(index, index, None, 0)
    tables = rope_tables(config, index, torch.float64, bounds)
    ours = stage.head(stage(None, Inputs(IDS, None, None, bounds, tables, tokens, position_ids=index)))
    return (theirs(input_ids=IDS[None]).logits[0] - ours).abs().max().item()


def test_tiny_copies_have_the_logits_of_transformers():
    """Copies that come out alike are computed once."""
    copies: dict[str, list[str]] = {}
    for name, raw in CONFIGS.items():
        assert config_from_dict(raw, name).vocab_size == raw["vocab_size"]
        copies.setdefault(json.dumps(tiny(raw), sort_keys=True), []).append(name)
    assert len(CONFIGS) + len(REFUSED) >= 90 and len(copies) > 40
    found = {tuple(names): difference(json.loads(copy)) for copy, names in copies.items()}
    assert not {names: value for names, value in found.items() if not value < 2e-6}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_for_a_reason(name):
    raw, said = REFUSED[name]
    with pytest.raises(UserError, match=said) as raised:
        config_from_dict(raw, name)
    assert raised.value.hint
