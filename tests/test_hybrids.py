"""Layers with states beside attention: what a folder holds that is not read, and what is refused before a run."""

from __future__ import annotations

import re

import pytest
import torch
from oracle import ALL_LINEAR, Run, check_all, fields_of
from safetensors.torch import load_file, save_file
from test_convert import done
from variants import peer_of

from megalora.adapters.config import LoraConfig
from megalora.building import base_names, resolve_lora
from megalora.checkpoint.adapter.peft import peft_caution
from megalora.checkpoint.base.weights import unread_layers
from megalora.errors import UserError
from megalora.models.config import check_context, check_layout, config_from_dict
from megalora.models.graphs import choose_graphs, layer_facts, tiled_by
from megalora.ops import fused_delta
from megalora.parallel.mesh import Axis, ParallelMesh
from megalora.parallel.placement import Placement

AHEAD = {"mtp.fc.weight": (48, 96), "mtp.layers.0.input_layernorm.weight": (48,)}


def test_layers_that_predict_further_tokens_are_told_and_kept(tmp_path, capsys):
    """To shards and back they keep every bit; a folder without them has no line."""
    base = tmp_path / "base"
    peer_of("qwen3_next", torch.float32, "sdpa").save_pretrained(base)
    names = base_names(config_from_dict(fields_of("qwen3_next")))
    assert unread_layers(base, names) is None
    tensors = load_file(base / "model.safetensors") | {name: torch.randn(shape) for name, shape in AHEAD.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    line = f"{base}: layers that only predict further tokens (mtp) are not loaded"
    assert unread_layers(base, names) == line
    done(capsys, "to-shards", "--input", base, "--output", tmp_path / "shards", "--tensor_parallel_size", 2)
    done(capsys, "to-hf", "--input", tmp_path / "shards", "--output", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], one) for name, one in tensors.items())


def test_layouts_that_states_do_not_have_are_refused():
    config = config_from_dict(fields_of("qwen3_next"))
    with pytest.raises(
        UserError, match=re.escape("context_parallel_size (2) is not implemented for layers of linear attention")
    ):
        check_context(config, 2, "CAUSAL_LM")
    check_context(config, 1, "CAUSAL_LM")
    with pytest.raises(UserError, match=re.escape("tensor_parallel_size (8) does not divide linear_num_key_heads (4)")):
        check_layout(config_from_dict(fields_of("qwen3_5_text")), 8, 1)
    check_layout(config, 4, 3)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"layer_types": ["conv"] * 4, "full_attn_idxs": None}, "no layer has attention"),
        ({"layer_types": ["conv", "full_attention", "sliding_attention", "conv"]}, "layer_types has 'sliding"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types is not what full_attn_idxs says"),
        ({"conv_dim": 40}, "conv_dim = 40 and hidden_size = 48 are one field"),
        ({"block_use_swiglu": False}, "block_use_swiglu = False is not implemented"),
    ],
)
def test_what_lfm2_does_not_have_is_refused(fields, said):
    with pytest.raises(UserError, match=re.escape(said)):
        config_from_dict(fields_of("lfm2") | fields)


@pytest.mark.parametrize(
    "family, fields, said",
    [
        ("granitemoehybrid", {"time_step_limit": [0.001, 0.1]}, "time_step_limit = (0.001, 0.1) is not implemented"),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi' is not"),
        ("granitemoehybrid", {"layer_types": ["mamba"] * 3}, "no layer has attention"),
        ("granitemoehybrid", {"layer_types": ["mamba", "conv", "attention"]}, "of kind 'conv'"),
        ("granitemoehybrid", {"mamba_n_groups": 3}, "8 heads of Mamba-2 are not a multiple of its 3 groups"),
        ("granitemoehybrid", {"num_experts_per_tok": 0}, "num_experts_per_tok = 0 is not valid"),
        ("granitemoehybrid", {"mamba_d_head": "wide"}, "mamba_d_head = 'wide' is not valid"),
        ("granitemoehybrid, dense", {"shared_intermediate_size": 0}, "layers have no MLP"),
        ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}, "mamba_norm_before_gate = True is not"),
        ("falcon_h1", {"mamba_proj_bias": True}, "mamba_proj_bias with an ssm_in_multiplier is not implemented"),
        ("falcon_h1", {"attention_bias": True}, "attention_bias with an attention_in_multiplier is not implemented"),
        ("falcon_h1", {"ssm_multipliers": [1.0] * 4}, "ssm_multipliers has 4 numbers, not 5"),
        ("falcon_h1", {"mlp_multipliers": [1.0]}, "mlp_multipliers has 1 numbers, not 2"),
        ("falcon_h1", {"mamba_d_ssm": 40, "mamba_d_head": 5, "mamba_n_heads": 7}, "transformers cannot read it"),
        ("bamba", {"attn_layer_indices": None}, "no layer has attention"),
        ("bamba", {"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25 is not implemented"),
        ("nemotron_h, experts", {"moe_latent_size": 16}, "field 'moe_latent_size' = 16 is not read"),
        ("nemotron_h, experts", {"n_shared_experts": 2}, "n_shared_experts = 2 is not implemented"),
        ("nemotron_h, experts", {"n_group": 4}, "n_group (4) must divide the number of experts (6)"),
        ("nemotron_h", {"hybrid_override_pattern": "M-?M"}, "transformers cannot read it"),
        ("nemotron_h", {"tie_word_embeddings": True}, "tie_word_embeddings = True is not implemented"),
        ("nemotron_h", {"mlp_hidden_act": "swoosh"}, "mlp_hidden_act = 'swoosh' is not implemented"),
        ("nemotron_h", {"time_step_limit": [0.0, 1.0]}, "time_step_limit = [0.0, 1.0] is not implemented"),
        ("nemotron_h", {"rope_theta": 5e5}, "rope_theta = 500000.0, but this model has no rotary positions"),
        ("bamba", {"z_loss_coefficient": 0.1}, "z_loss_coefficient = 0.1 is not implemented"),
    ],
)
def test_what_mamba_does_not_have_is_refused(family, fields, said):
    with pytest.raises(UserError, match=re.escape(said)):
        config_from_dict(fields_of(family) | fields)


def test_what_peft_refuses_is_adapted_where_it_is_named():
    config = config_from_dict(fields_of("falcon_h1"))
    out = {name for name in config.linears if name.endswith(".mamba.out_proj")}
    every = resolve_lora(LoraConfig.from_dict(ALL_LINEAR), config).adapters
    assert len(out) == 4 and every.keys() == config.linears.keys() - out
    named = resolve_lora(LoraConfig.from_dict(ALL_LINEAR | {"target_modules": ["out_proj"]}), config).adapters
    assert named.keys() == out
    assert peft_caution("falcon_h1", every, ()) is None
    bamba = config_from_dict(fields_of("bamba"))
    assert resolve_lora(LoraConfig.from_dict(ALL_LINEAR), bamba).adapters.keys() == bamba.linears.keys()


def test_an_infinite_limit_is_read_as_transformers_writes_it():
    fields = fields_of("bamba")
    wanted = config_from_dict(fields)
    for limit in ([0.0, {"__float__": "Infinity"}], [0.0, float("inf")], None):
        assert config_from_dict(fields | {"time_step_limit": limit}) == wanted


def test_layouts_that_cut_groups_of_heads_unevenly_are_refused():
    config = config_from_dict(fields_of("bamba", num_attention_heads=24, mamba_n_heads=24, mamba_n_groups=4))
    for tp in (1, 2, 4, 8):
        check_layout(config, tp, 1)
    with pytest.raises(UserError, match=re.escape("(3) cuts the 24 heads of Mamba-2 so that a rank has unlike parts")):
        check_layout(config, 3, 1)
    with pytest.raises(UserError, match=re.escape("(8) does not divide the heads of Mamba-2 (12)")):
        check_layout(config_from_dict(fields_of("bamba", mamba_n_heads=12)), 8, 1)
    with pytest.raises(UserError, match=re.escape("not implemented for layers of Mamba-2")):
        check_context(config, 2, "CAUSAL_LM")


def test_short_convolutions_need_the_tokens_before():
    config = config_from_dict(fields_of("lfm2"))
    assert config.recurrent
    with pytest.raises(UserError, match=re.escape("not implemented for layers of gated short convolutions")):
        check_context(config, 2, "CAUSAL_LM")
    with pytest.raises(UserError, match="whose layers of gated short convolutions have biases"):
        lora = LoraConfig.from_dict(ALL_LINEAR | {"bias": "all"})
        resolve_lora(lora, config_from_dict(fields_of("lfm2, biases")))
    resolve_lora(LoraConfig.from_dict(ALL_LINEAR | {"bias": "all"}), config)


def test_all_biases_would_be_decays_too_for_peft():
    config = config_from_dict(fields_of("qwen3_next"))
    with pytest.raises(
        UserError, match="bias = 'all' is not implemented .* whose layers of linear attention .* have biases"
    ):
        resolve_lora(LoraConfig.from_dict(ALL_LINEAR | {"bias": "all"}), config)


@pytest.mark.parametrize("family, dtype, features, why", [
    ("qwen3_5_text", torch.bfloat16, 128, None),
    ("qwen3_5_text", torch.float16, 128, "states in plain torch"),
    ("qwen3_5_text", torch.bfloat16, 64, "states in plain torch"),
    ("qwen3_next", torch.bfloat16, 128, None),
    ("lfm2", torch.float16, 0, None),
    ("bamba", torch.bfloat16, 0, "states in plain torch"),
])  # fmt: skip
def test_there_are_graphs_where_states_have_kernels(family, dtype, features, why, monkeypatch):
    monkeypatch.setattr(fused_delta, "has_triton", lambda: True)
    monkeypatch.setattr(fused_delta, "_large_shared_memory", lambda device: True)
    heads = {"linear_key_head_dim": features, "linear_value_head_dim": features} if features else {}
    config, place = config_from_dict(fields_of(family, **heads)), Placement(Axis(), False, dtype, "cuda")
    assert config.recurrent and tiled_by(config, place) == layer_facts(config, place)["tiled"] == why
    used, note = choose_graphs(None, place, ParallelMesh(), **layer_facts(config, place) | {"head_dim": 128})
    assert used == (why is None) and (used or why in note)


@pytest.mark.parametrize("family, base_format", [("bamba", "nf4"), ("falcon_h1, a norm", "fp8"), ("lfm2", "nf4_fp8")])
def test_a_quantised_base_is_cut_as_a_dense_one(family, base_format):
    run = Run(family, tp=2, sequence_parallel=True, steps=1, rows=2, base_format=base_format, learning_rate=1e-4)
    check_all([(run, 1)])


@pytest.mark.parametrize("family, fields", [("bamba", {"mamba_n_groups": 1}), ("nemotron_h", {"n_groups": 1})])
def test_heads_of_one_group_are_cut_unevenly(family, fields):
    """Eight heads over three ranks, whose norm is of all."""
    lora = ALL_LINEAR | {"lora_dropout": 0.2}
    check_all([(Run(family, tp=3, sequence_parallel=True, rows=2, model=fields_of(family) | fields, lora=lora), 1)])
