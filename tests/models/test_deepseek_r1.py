"""DeepSeek-R1 as it is published: each name of its index, and what a rank of 16 or 32 GPUs holds."""

from __future__ import annotations

import json
import math
import re

import pytest

from megalora.building import base_names
from megalora.cli import main
from megalora.models.config import config_from_dict

R1 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


def names_of_a_layer(layer: int) -> tuple[list[str], list[str]]:
    """(linears in e4m3, tensors in bfloat16 or float32) of a layer of the index, by its rule."""
    linears = [f"self_attn.{name}" for name in ATTENTION]
    others = ["input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"]
    if layer < 3:
        linears += [f"mlp.{name}" for name in GATED]
    else:
        places = [f"experts.{expert}" for expert in range(256)] + ["shared_experts"]
        linears += [f"mlp.{place}.{name}" for place in places for name in GATED]
        others += ["mlp.gate"]
    if layer == 61:  # predicts one more token
        others += ["embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"]
    named = [f"model.layers.{layer}.{name}.weight" for name in others]
    named += [f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] if layer >= 3 else []
    return [f"model.layers.{layer}.{name}" for name in linears], named


def test_every_name_of_the_index_is_known():
    """Weights are the model's, scales are those of its linears, and the rest is of the layer that is passed over."""
    names = base_names(config_from_dict(R1))
    index = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    scales = set()
    for layer in range(62):
        linears, others = names_of_a_layer(layer)
        index |= {f"{name}.weight" for name in linears} | set(others)
        scales |= {f"{name}.weight_scale_inv" for name in linears}
    passed = {name for name in index if names.files.ours(name, names.shapes) is None}
    assert index - passed == set(names.shapes)
    assert passed == {name for name in index if name.startswith("model.layers.61.")}
    assert {name.removesuffix("_scale_inv") for name in scales} - passed <= set(names.shapes)
    assert len(index | scales) == 91991
    assert sum(map(math.prod, names.shapes.values())) == 671_026_419_200


@pytest.mark.parametrize(
    "gpus, pp, base, weights",
    [(16, 2, "fp8", (37, 42)), (32, 4, "dense", (35, 46))],
)
def test_it_is_planned_on_the_gpus_that_it_needs(gpus, pp, base, weights, tmp_path, capsys):
    """GiB of the weights of each stage: 671e9 bytes over 16 ranks, or 1.34e12 over 32; all fits into 80 GiB."""
    (tmp_path / "config.json").write_text(json.dumps(R1))
    lora = json.dumps({"r": 16, "target_modules": list(ATTENTION)})
    layout = ("--tensor_parallel_size", "8", "--pipeline_parallel_size", f"{pp}", "--base_format", base)
    more = ("--lora_config", lora, "--seq_length", "4096", "--global_batch_size", "16", "--memory", "80")
    status = main(["plan", "--model_path", str(tmp_path / "config.json"), "--gpus", f"{gpus}", *layout, *more])
    out = capsys.readouterr().out
    assert status == 0
    gib = r" +(\d+\.\d+)"  # of weights, adapters, activations, buffers, and together
    stages = re.findall(rf"^ +(\d+) +((?:\d+-\d+ )+) .*?{gib * 5} *$", out, re.M)
    assert [int(found[0]) for found in stages] == list(range(pp)) and stages[-1][1].endswith("-60 "), out
    for _, _, held, _, _, _, total in stages:
        assert weights[0] <= float(held) <= weights[1] and float(total) <= 76, out
