"""Training runs of tiny random models on any mesh: what the layout tests compare.

A run here goes through the same `build_trainer` as `megalora finetune`; only weights and rows are made up, from names
and seeds, the same on every layout.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from shared_memory import SharedMemory
from spawn import spawn

from megalora.adapters.config import LoraConfig
from megalora.building import EngineSettings, build_trainer, resolve_lora
from megalora.data import Loader, build_rows, pack
from megalora.data.documents import Documents
from megalora.data.packing import Sides, pack_sides
from megalora.data.template import Sample
from megalora.errors import UserError
from megalora.models.config import config_from_dict
from megalora.models.spec import ModelSpec
from megalora.models.stage import Stage
from megalora.parallel.exchange import Exchange
from megalora.parallel.formats import BaseFormat
from megalora.parallel.mesh import build_mesh
from megalora.parallel.placement import Placement
from megalora.parallel.split import Split, named_splits
from megalora.pictures import Picture
from megalora.planning.nodes import Workload

TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "llama": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5, "head_dim": 10},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {
        "model_type": "qwen3", "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "phi3": {"model_type": "phi3", "sliding_window": 7, "pad_token_id": 0, "eos_token_id": 0},
    "gpt_neox": {
        "model_type": "gpt_neox", "hidden_act": "gelu", "rotary_pct": 0.67, "layer_norm_eps": 1e-5,
        "num_key_value_heads": None, "rms_norm_eps": None,
    },
}  # fmt: skip
# Models of experts, which tests of their own go through (tests/test_experts.py).
EXPERTS = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6},
    "qwen2_moe": {
        "model_type": "qwen2_moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "norm_topk_prob": True, "head_dim": 8,
    },
    "qwen3_next": {
        "model_type": "qwen3_next", "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 6, "linear_value_head_dim": 10, "full_attention_interval": 2, "mlp_only_layers": [1],
        "rope_theta": 1e6, "partial_rotary_factor": 0.5,
    },
    "qwen3_5_moe_text": {
        "model_type": "qwen3_5_moe_text", "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 6, "full_attention_interval": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2", "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "q_lora_rank": None,
        "kv_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "num_key_value_heads": 8,
        "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3", "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "moe_intermediate_size": 24, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "q_lora_rank": 28,
        "kv_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 8,
        "n_group": 4, "topk_group": 2, "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 4.0, "mscale": 0.8, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
            "original_max_position_embeddings": 64,
        },
    },
    "glm4_moe": {
        "model_type": "glm4_moe", "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "moe_intermediate_size": 16, "first_k_dense_replace": 2, "routed_scaling_factor": 1.5, "head_dim": 8,
        "use_qk_norm": True, "attention_bias": True, "n_group": 2, "topk_group": 1,
    },
    "kimi_k2": {
        "model_type": "kimi_k2", "n_routed_experts": 5, "num_experts_per_tok": 3, "n_shared_experts": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827, "q_lora_rank": 24,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 8,
        "n_group": 1, "topk_group": 1, "rope_theta": 50000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 32,
        },
    },
    "glm4_moe_lite": {
        "model_type": "glm4_moe_lite", "n_routed_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "moe_intermediate_size": 24, "mlp_layer_types": ["dense", "sparse", "sparse"], "q_lora_rank": 28,
        "kv_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 12, "num_key_value_heads": 8,
        "partial_rotary_factor": 1.0, "rope_theta": 1e6,
    },
    "minimax_m2": {
        "model_type": "minimax_m2", "num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 10, "rotary_dim": 4,
        "intermediate_size": 24,
    },
    "olmoe": {
        "model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24,
        "attention_bias": True, "pad_token_id": 1,
    },
    "dots1": {
        "model_type": "dots1", "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2, "head_dim": 8,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        "sliding_window": 5, "max_window_layers": 2, "attention_bias": True,
    },
    "solar_open": {
        "model_type": "solar_open", "n_routed_experts": 6, "num_experts_per_tok": 4, "n_shared_experts": 1,
        "moe_intermediate_size": 16, "head_dim": 10,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    },
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe", "moe_num_experts": 6, "num_experts_per_tok": 3, "moe_num_shared_experts": 2,
        "moe_intermediate_size": 16, "moe_layer_start_index": 1, "tie_word_embeddings": True,
    },
    "granitemoe": {
        "model_type": "granitemoe", "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24,
        "embedding_multiplier": 12.0, "attention_multiplier": 0.21, "logits_scaling": 6.0, "residual_multiplier": 0.22,
        "tie_word_embeddings": True,
    },
    "granitemoeshared": {
        "model_type": "granitemoeshared", "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 24,
        "embedding_multiplier": 6.0, "attention_multiplier": 0.21, "logits_scaling": 3.0, "residual_multiplier": 0.3,
        "shared_intermediate_size": 40,
    },
    "granitemoe_swa": {
        "model_type": "granitemoe_swa", "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 24,
        "attention_multiplier": 0.21, "logits_scaling": 3.0, "residual_multiplier": 0.3, "tie_word_embeddings": True,
        "shared_intermediate_size": 32, "sliding_window": 6, "layer_rope_theta": [1e4, 0, 5e5],
    },
    "exaone_moe": {
        "model_type": "exaone_moe", "num_experts": 6, "num_experts_per_tok": 3, "num_shared_experts": 2, "head_dim": 8,
        "moe_intermediate_size": 16, "sliding_window": 5, "sliding_window_pattern": 2, "n_group": 2, "topk_group": 1,
    },
    "hunyuan_v1_moe": {
        "model_type": "hunyuan_v1_moe", "num_experts": 5, "moe_topk": 2, "head_dim": 8, "intermediate_size": 24,
        "pad_token_id": 0, "rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0},
    },
    "mistral4": {
        "model_type": "mistral4", "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "moe_intermediate_size": 24, "first_k_dense_replace": 1, "q_lora_rank": 28, "kv_lora_rank": 20,
        "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 8, "pad_token_id": 0,
        "n_group": 2, "topk_group": 1,
        "rope_parameters": {
            "type": "yarn", "rope_type": "yarn", "rope_theta": 1e5, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.4,
            "max_position_embeddings": 256, "partial_rotary_factor": 0.4,
        },
    },
    "sarvam_mla": {
        "model_type": "sarvam_mla", "num_experts": 5, "num_experts_per_tok": 2, "num_shared_experts": 1,
        "moe_intermediate_size": 16, "routed_scaling_factor": 2.5, "kv_lora_rank": 20, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4, "v_head_dim": 5, "num_key_value_heads": 8, "rope_theta": 10000.0,
    },
    "cohere2_moe": {
        "model_type": "cohere2_moe", "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 10, "sliding_window": 6,
        "sliding_window_pattern": 2, "logit_scale": 0.7, "pad_token_id": 0, "intermediate_size": 24,
        "rms_norm_eps": None, "num_shared_experts": 2, "first_k_dense_replace": 1, "expert_selection_fn": "sigmoid",
        "prefix_dense_intermediate_size": 40,
    },
    "afmoe": {
        "model_type": "afmoe", "num_experts": 6, "num_experts_per_tok": 3, "num_shared_experts": 1, "head_dim": 8,
        "moe_intermediate_size": 24, "num_dense_layers": 1, "route_scale": 2.8, "sliding_window": 5,
        "global_attn_every_n_layers": 2, "mup_enabled": True,
    },
    "gemma4_text, experts": {
        "model_type": "gemma4_text", "head_dim": 6, "global_head_dim": 10, "num_global_key_value_heads": 2,
        "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "sliding_window": 6, "pad_token_id": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "enable_moe_block": True,
        "num_experts": 6, "top_k_experts": 3, "moe_intermediate_size": 24,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.4, "rope_theta": 2e5},
        },
    },
    "lfm2_moe": {
        "model_type": "lfm2_moe", "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"], "norm_eps": 1e-6,
        "routed_scaling_factor": 1.5, "rms_norm_eps": None,
    },
    "granitemoehybrid": {
        "model_type": "granitemoehybrid", "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24,
        "embedding_multiplier": 6.0, "attention_multiplier": 0.21, "logits_scaling": 3.0, "residual_multiplier": 0.3,
        "shared_intermediate_size": 40, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8,
        "mamba_d_head": "auto", "mamba_d_state": 10, "mamba_chunk_size": 8, "position_embedding_type": "nope",
        "tie_word_embeddings": True,
    },
    "nemotron_h, experts": {
        "model_type": "nemotron_h", "rms_norm_eps": None, "hybrid_override_pattern": "ME*", "head_dim": 8,
        "mamba_num_heads": 8, "mamba_head_dim": 6, "n_groups": 2, "ssm_state_size": 6, "time_step_min": 1e-20,
        "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1,
        "moe_shared_expert_intermediate_size": 40, "routed_scaling_factor": 2.5,
    },
    "phimoe": {
        "model_type": "phimoe", "num_local_experts": 5, "num_experts_per_tok": 2, "attention_bias": True,
        "lm_head_bias": True, "router_jitter_noise": 0.3, "intermediate_size": 24, "sliding_window": 200,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0, 1.3, 2.0], "long_factor": [1.5, 4.0, 9.0], "short_mscale": 1.2,
            "long_mscale": 1.2, "original_max_position_embeddings": 200,
        },
    },
    "hy_v3": {
        "model_type": "hy_v3", "num_experts": 6, "num_experts_per_tok": 3, "num_shared_experts": 1, "head_dim": 10,
        "moe_intermediate_size": 24, "enable_moe_fp32_combine": False,
    },
    "llama4_text": {
        "model_type": "llama4_text", "num_local_experts": 6, "num_experts_per_tok": 1, "intermediate_size": 32,
        "intermediate_size_mlp": 56, "head_dim": 8, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 3,
        "attention_chunk_size": 7, "floor_scale": 4, "attn_scale": 0.3, "pad_token_id": 0, "rope_theta": 10000.0,
    },
    "gpt_oss": {
        "model_type": "gpt_oss", "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 32,
        "head_dim": 8, "sliding_window": 6, "swiglu_limit": 0.6, "pad_token_id": 0,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
}  # fmt: skip
# The older decoders, which tests of their own go through (tests/test_classic.py).
_NO_PDROP = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
CLASSIC = {
    "gpt2": {"model_type": "gpt2", **_NO_PDROP},
    "gpt_bigcode": {"model_type": "gpt_bigcode", **_NO_PDROP},
    "gpt_neo": {
        "model_type": "gpt_neo", "window_size": 6, "num_hidden_layers": 2,
        "attention_types": [[["global", "local"], 1]],
    },
    "gptj": {"model_type": "gptj", "rotary_dim": 4},
    "codegen": {"model_type": "codegen", "rotary_dim": 4},
    "bloom": {"model_type": "bloom"},
    "mpt": {"model_type": "mpt", "max_seq_len": 256},
    "falcon": {
        "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 4, "ffn_hidden_size": 80,
    },
    "RefinedWebModel": {"model_type": "RefinedWebModel", "multi_query": True, "parallel_attn": True},
    "RefinedWeb": {"model_type": "RefinedWeb", "n_head_kv": 2},
    "opt": {"model_type": "opt", "ffn_dim": 80, "dropout": 0.0},
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.7, "layer_norm_eps": 1e-5},
    "chatglm": {
        "model_type": "chatglm", "padded_vocab_size": 131, "ffn_hidden_size": 80, "kv_channels": 8, "seq_length": 256,
        "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "layernorm_epsilon": 1e-5,
    },
    "internlm2": {"model_type": "internlm2", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "btlm": {
        "model_type": "btlm", "n_inner": 80, "activation_function": "swiglu", "position_embedding_type": "alibi",
        "mup_embeddings_scale": 1.7, "mup_output_alpha": 2.0, "mup_width_scale": 0.6, "mup_scale_qk_dot_by_d": True,
        "layer_norm_epsilon": 1e-5, **_NO_PDROP,
    },
}  # fmt: skip
# Decoders of today, a row for each variant of their configs: tests/test_modern.py goes through all of them.
_NO_RMS = {"rms_norm_eps": None}
_LONG = {
    "type": "longrope", "short_factor": [1.0, 1.3, 2.0], "long_factor": [1.5, 4.0, 9.0],
}  # fmt: skip
_LAST_IS_FULL = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 6}
MODERN = {
    "gemma": {"model_type": "gemma", "head_dim": 10, "pad_token_id": 0},
    "gemma, old name of its activation": {
        "model_type": "gemma", "hidden_act": "gelu", "num_key_value_heads": 1, "head_dim": 6, "pad_token_id": 0,
    },
    "gemma2": {
        "model_type": "gemma2", "head_dim": 10, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 17, "sliding_window": 7, "pad_token_id": 0,
    },
    "gemma2, no softcaps": {
        "model_type": "gemma2", "head_dim": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "query_pre_attn_scalar": 24, "sliding_window": 5, "pad_token_id": 0, "attention_bias": True,
    },
    "gemma3_text": {
        "model_type": "gemma3_text", "head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 6,
        "sliding_window_pattern": 3, "rope_theta": 1e5, "rope_local_base_freq": 5e3, "pad_token_id": 0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3_text, new form": {
        "model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8, "pad_token_id": 0, **_LAST_IS_FULL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
            "full_attention": {"rope_type": "default", "rope_theta": 2e5},
        },
    },
    "granite": {
        "model_type": "granite", "embedding_multiplier": 12.0, "attention_multiplier": 0.21, "logits_scaling": 3.0,
        "residual_multiplier": 0.22, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "cohere": {"model_type": "cohere", **_NO_RMS, "logit_scale": 0.6, "pad_token_id": 0},
    "cohere, norms on the heads": {
        "model_type": "cohere", **_NO_RMS, "use_qk_norm": True, "attention_bias": True, "num_key_value_heads": 2,
        "pad_token_id": 0, "logit_scale": 1.3,
    },
    "cohere2": {
        "model_type": "cohere2", **_NO_RMS, "head_dim": 10, "sliding_window": 6, "sliding_window_pattern": 2,
        "logit_scale": 0.7, "pad_token_id": 0,
    },
    "olmo2": {"model_type": "olmo2", "rope_theta": 5e5, "num_key_value_heads": 2},
    "olmo3": {
        # transformers 5.24 gives layers that slide its default theta, 5e5, whatever rope_theta is in the old form.
        "model_type": "olmo3", **_LAST_IS_FULL, "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    },
    "olmo3, new form": {
        "model_type": "olmo3", "layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 4,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e5},
        },
    },
    "smollm3": {
        "model_type": "smollm3", "no_rope_layer_interval": 3, "tie_word_embeddings": True, "pad_token_id": 0,
        "mlp_bias": True,
    },
    "smollm3, windows": {
        "model_type": "smollm3", "no_rope_layers": [0, 1, 0, 1], "use_sliding_window": True, "sliding_window": 5,
        "pad_token_id": 0, "attention_bias": True,
    },
    "starcoder2": {"model_type": "starcoder2", **_NO_RMS, "sliding_window": 7, "num_key_value_heads": 2},
    "starcoder2, no biases": {"model_type": "starcoder2", **_NO_RMS, "use_bias": False, "hidden_act": "gelu"},
    "nemotron": {"model_type": "nemotron", **_NO_RMS, "head_dim": 8, "mlp_bias": True},
    "nemotron, a wide head": {
        "model_type": "nemotron", **_NO_RMS, "head_dim": 12, "partial_rotary_factor": 1.0, "attention_bias": True,
    },
    "glm": {"model_type": "glm", "head_dim": 8, "pad_token_id": 0},
    "glm4": {
        "model_type": "glm4", "head_dim": 12, "attention_bias": False, "num_key_value_heads": 2, "pad_token_id": 0,
    },
    "exaone4": {"model_type": "exaone4", "head_dim": 8, **_LAST_IS_FULL},
    "exaone4, no windows": {
        "model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 4,
        "tie_word_embeddings": True,
    },
    "stablelm": {"model_type": "stablelm", **_NO_RMS, "partial_rotary_factor": 0.67, "use_qkv_bias": True},
    "stablelm, beside each other": {
        "model_type": "stablelm", **_NO_RMS, "partial_rotary_factor": 0.67, "use_parallel_residual": True,
        "qk_layernorm": True, "num_key_value_heads": 2,
    },
    "phi3, longrope": {
        "model_type": "phi3", "pad_token_id": 0, "eos_token_id": 0, "rope_scaling": _LONG,
        "original_max_position_embeddings": 16,
    },
    "phi3, part of a head": {
        "model_type": "phi3", "pad_token_id": 0, "eos_token_id": 0, "partial_rotary_factor": 0.67,
        "rope_scaling": _LONG | {"short_factor": [1.0, 1.2], "long_factor": [1.5, 6.0]},
        "original_max_position_embeddings": 16, "tie_word_embeddings": True,
    },
    "qwen3, YaRN": {
        "model_type": "qwen3", "max_position_embeddings": 32, "use_sliding_window": True, "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "internlm3": {
        "model_type": "internlm3", "head_dim": 8, "qkv_bias": True, "bias": True, "pad_token_id": 0,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
    },
    "seed_oss": {
        "model_type": "seed_oss", "head_dim": 8, "attention_out_bias": True, "mlp_bias": True,
        "attention_dropout": 0.0, "residual_dropout": 0.0,
    },
    "arcee": {"model_type": "arcee", "attention_bias": True, "mlp_bias": True},
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 10, "use_bias": True},
    "helium": {"model_type": "helium", "head_dim": 6, "pad_token_id": 0, "attention_bias": True},
    "cwm": {
        "model_type": "cwm", "head_dim": 8, "sliding_window": 6,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "ministral3": {
        "model_type": "ministral3", "head_dim": 8, "sliding_window": 9, "pad_token_id": 0,
        "rope_parameters": {
            "type": "yarn", "rope_type": "yarn", "rope_theta": 1e5, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.4,
            "max_position_embeddings": 256,
        },
    },
    "hunyuan_v1_dense": {
        "model_type": "hunyuan_v1_dense", "head_dim": 8, "attention_bias": True, "pad_token_id": 0,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "type": "dynamic", "alpha": 50.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "olmo": {"model_type": "olmo", **_NO_RMS, "clip_qkv": 0.4, "pad_token_id": 0},
    "apertus": {
        "model_type": "apertus", "attention_bias": True, "pad_token_id": 0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "hyperclovax": {
        "model_type": "hyperclovax", "head_dim": 8, "embedding_multiplier": 10.0, "attention_multiplier": 0.21,
        "logits_scaling": 0.3, "residual_multiplier": 0.6, "attention_bias": True, "mlp_bias": True,
    },
    "minicpm3": {
        "model_type": "minicpm3", "num_key_value_heads": 8, "q_lora_rank": 28, "kv_lora_rank": 20,
        "qk_nope_head_dim": 6, "qk_rope_head_dim": 6, "v_head_dim": 5, "scale_emb": 3.0, "scale_depth": 1.4,
        "dim_model_base": 20, "mlp_bias": True, "attention_bias": True,
        "rope_scaling": _LONG | {"original_max_position_embeddings": 256},
    },
    "qwen3_5_text": {
        "model_type": "qwen3_5_text", "head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 6, "linear_value_head_dim": 10, "attention_bias": True,
        "layer_types": ["linear_attention"] * 2 + ["full_attention", "linear_attention"],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0],
            "mrope_interleaved": True,
        },
    },
    "qwen3_5_text, one value a key": {
        "model_type": "qwen3_5_text", "head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 2, "num_key_value_heads": 8,
        "full_attention_interval": 2, "tie_word_embeddings": True,
    },
    "lfm2": {
        "model_type": "lfm2", **_NO_RMS, "full_attn_idxs": [1, 3], "block_multiple_of": 16, "block_ff_dim": 112,
        "intermediate_size": None, "norm_eps": 1e-6, "rope_theta": 1e5,
    },
    "lfm2, biases": {
        "model_type": "lfm2", **_NO_RMS, "layer_types": ["conv", "full_attention", "conv", "conv"], "conv_bias": True,
        "conv_L_cache": 4, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False, "num_key_value_heads": 2,
    },
    "granitemoehybrid, dense": {
        "model_type": "granitemoehybrid", "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 16,
        "embedding_multiplier": 6.0, "attention_multiplier": 0.21, "logits_scaling": 3.0, "residual_multiplier": 0.3,
        "shared_intermediate_size": 80, "layer_types": ["mamba", "mamba", "attention", "mamba"], "mamba_n_groups": 4,
        "mamba_d_state": 6, "mamba_d_conv": 3, "mamba_conv_bias": False, "mamba_proj_bias": True,
        "position_embedding_type": "rope", "mamba_expand": 1, "intermediate_size": 24,
    },
    "bamba": {
        "model_type": "bamba", "attn_layer_indices": [2], "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 6,
        "attention_bias": True, "mlp_bias": True, "head_dim": 8,
    },
    "falcon_h1": {
        "model_type": "falcon_h1", "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 8, "mamba_d_state": 6,
        "mamba_norm_before_gate": False, "embedding_multiplier": 5.0, "lm_head_multiplier": 0.6, "key_multiplier": 0.4,
        "mlp_multipliers": [0.9, 0.6], "ssm_multipliers": [0.9, 0.7, 1.2, 0.8, 1.1], "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.7, "attention_in_multiplier": 1.1, "attention_out_multiplier": 0.9,
    },
    "falcon_h1, a norm": {
        "model_type": "falcon_h1", "mamba_d_ssm": None, "mamba_expand": 1, "mamba_n_heads": 8, "mamba_n_groups": 2,
        "mamba_d_state": 6, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "attention_bias": True,
        "mamba_proj_bias": True, "projectors_bias": True, "mlp_bias": True, "attention_out_multiplier": 0.6,
        "ssm_out_multiplier": 1.4, "tie_word_embeddings": True,
    },
    "nemotron_h": {
        "model_type": "nemotron_h", **_NO_RMS, "hybrid_override_pattern": "M-*M", "head_dim": 10, "mamba_num_heads": 8,
        "mamba_head_dim": 5, "n_groups": 4, "ssm_state_size": 6, "chunk_size": 8, "time_step_min": 1e-20,
    },
    "nemotron_h, biases": {
        "model_type": "nemotron_h", **_NO_RMS, "layers_block_type": ["mamba", "mlp", "mamba", "attention"],
        "head_dim": 6, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 10, "use_bias": True,
        "mlp_bias": True, "use_conv_bias": False, "conv_kernel": 2, "time_step_min": 1e-20,
        "layer_norm_epsilon": 1e-6,
    },
    "vaultgemma": {
        "model_type": "vaultgemma", "head_dim": 10, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 17, "sliding_window": 7, "pad_token_id": 0,
    },
    "ministral": {"model_type": "ministral", "head_dim": 8, **_LAST_IS_FULL},
    "nanochat": {"model_type": "nanochat", "num_key_value_heads": 2, "final_logit_softcapping": 2.0},
    "jais2": {"model_type": "jais2", **_NO_RMS, "head_dim": 8},
    "youtu": {
        "model_type": "youtu", "num_key_value_heads": 8, "q_lora_rank": 28, "kv_lora_rank": 20, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4, "v_head_dim": 5, "tie_word_embeddings": True, "rope_theta": 1.6e6,
    },
    "gemma4_text": {
        "model_type": "gemma4_text", "head_dim": 6, "global_head_dim": 10, "num_global_key_value_heads": 2,
        "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "sliding_window": 6, "pad_token_id": 0,
        "layer_types": ["full_attention", "sliding_attention"] * 2, "final_logit_softcapping": 2.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.4, "rope_theta": 2e5},
        },
    },
    "gemma4_text, values of their own": {
        "model_type": "gemma4_text", "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0,
        **_LAST_IS_FULL, "pad_token_id": 0, "attention_bias": True, "tie_word_embeddings": False,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 2e5},
        },
    },
    "iquestcoder": {"model_type": "iquestcoder", "head_dim": 8, "rope_theta": 5e5},
    "granite_swa": {
        "model_type": "granite_swa", "embedding_multiplier": 12.0, "attention_multiplier": 0.21, "logits_scaling": 3.0,
        "residual_multiplier": 0.22, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"] * 2,
        "layer_rope_theta": [0, 1e4, 5e5, 1e4], "tie_word_embeddings": True,
    },
}  # fmt: skip
# Fields of TINY that a family's config does not have.
# Encoders, with the dropouts that their configs have in practice.
ENCODERS = {
    "bert": {"model_type": "bert", "layer_norm_eps": 1e-6},
    "roberta": {"model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-6},
    "xlm-roberta": {"model_type": "xlm-roberta", "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-6},
    "camembert": {"model_type": "camembert", "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-6},
    "electra": {"model_type": "electra", "embedding_size": 24, "layer_norm_eps": 1e-6},
    "layoutlm": {"model_type": "layoutlm", "layer_norm_eps": 1e-6, "max_2d_position_embeddings": 1024},
    "distilbert": {"model_type": "distilbert", "hidden_dim": 80, "pad_token_id": 1},
    "ernie": {"model_type": "ernie", "layer_norm_eps": 1e-6, "use_task_id": True},
    "xlm-roberta-xl": {"model_type": "xlm-roberta-xl", "pad_token_id": 1, "type_vocab_size": 1},
    "mpnet": {"model_type": "mpnet", "layer_norm_eps": 1e-6},
    "modernbert": {
        "model_type": "modernbert", "local_attention": 7, "classifier_pooling": "mean", "norm_eps": 1e-6,
        "pad_token_id": 0, "mlp_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1,
        "classifier_dropout": 0.1,
    },
    "modernbert, biases": {
        "model_type": "modernbert", "local_attention": 4, "global_attn_every_n_layers": 2, "pad_token_id": 0,
        "attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True,
        "global_rope_theta": 5e4, "local_rope_theta": 3e3, "classifier_activation": "relu",
    },
    "deberta": {
        "model_type": "deberta", "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
        "position_biased_input": False, "max_relative_positions": 9,
    },
    "deberta-v2": {
        "model_type": "deberta-v2", "relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 7,
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False, "pooler_dropout": 0.1,
        "max_relative_positions": 20,
    },
    "deberta-v2, apart": {
        "model_type": "deberta-v2", "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2,
        "max_relative_positions": 12,
    },
}
# Encoder-decoders, with the dropouts that their configs have in practice.
_T5 = {
    "d_model": 48, "d_kv": 6, "d_ff": 80, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 8,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
_BART = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "max_position_embeddings": 256,
}  # fmt: skip
SEQ2SEQ = {
    "t5": {"model_type": "t5", **_T5, "decoder_start_token_id": 0},
    "t5, version 1.1": {
        "model_type": "t5", **_T5, "decoder_start_token_id": 0, "num_decoder_layers": 3, "d_kv": 8,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    "mt5": {"model_type": "mt5", **_T5, "feed_forward_proj": "gated-gelu"},
    "umt5": {"model_type": "umt5", **_T5},
    "bart": {
        "model_type": "bart", **_BART, "scale_embedding": True, "attention_dropout": 0.1, "activation_dropout": 0.1,
        "forced_bos_token_id": 0,
    },
    "mbart": {"model_type": "mbart", **_BART, "scale_embedding": True, "decoder_start_token_id": 2},
    "pegasus": {"model_type": "pegasus", **_BART, "scale_embedding": True, "activation_dropout": 0.1},
    "m2m_100": {"model_type": "m2m_100", **_BART, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
}  # fmt: skip
# Models that read an image before each text; the language models have their dropouts too.
_TOWERS = {
    "vision_config": {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28,
        "patch_size": 7,
    },
    "qformer_config": {
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
    },
    "num_query_tokens": 4,
    "image_token_index": 130,
}  # fmt: skip
IMAGES = {
    "blip-2, opt": {
        "model_type": "blip-2", **_TOWERS,
        "text_config": {
            "model_type": "opt", "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 80, "num_hidden_layers": 4,
            "num_attention_heads": 8, "vocab_size": 131, "max_position_embeddings": 256,
        },
    },
    "blip-2, t5": {
        "model_type": "blip-2", **_TOWERS,
        "text_config": {"model_type": "t5", "vocab_size": 131, **_T5, "decoder_start_token_id": 0},
    },
}  # fmt: skip
_OLD = ("num_key_value_heads", "rms_norm_eps", "head_dim")
_OLDER = (*_OLD, "intermediate_size")
LACKS = {
    "youtu": ("head_dim",), "ernie4_5_moe": ("head_dim",), "granitemoe": ("head_dim",), "olmoe": ("head_dim",),
    "granitemoeshared": ("head_dim",), "granitemoe_swa": ("head_dim",), "granitemoehybrid": ("head_dim",),
    "solar_open": ("intermediate_size",), "phimoe": ("head_dim",),
    "qwen3_5_moe_text": ("intermediate_size",),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2", "mistral4", "sarvam_mla"), ("head_dim",)
    ),
    "gpt_neox": _OLD, "phi3": ("head_dim",), "phi": ("rms_norm_eps", "head_dim"), "gpt_neo": _OLD,
    **dict.fromkeys(ENCODERS, _OLD),
    "distilbert": _OLDER,
    **dict.fromkeys(SEQ2SEQ, tuple(name for name in TINY if name != "vocab_size")),
    **dict.fromkeys(IMAGES, tuple(TINY)),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gptj", "codegen", "falcon", "opt", "btlm"), _OLDER),
    **dict.fromkeys(("bloom", "mpt", "RefinedWeb", "RefinedWebModel"), (*_OLDER, "max_position_embeddings")),
    "chatglm": (*_OLDER, "max_position_embeddings", "vocab_size"),
}  # fmt: skip


def fields_of(family: str, **more: object) -> dict:
    """config.json of a tiny model of the family, with `more` where the family has such fields."""
    layers = {"num_hidden_layers": 3} if family in EXPERTS else {}  # each of which has many linears
    own = (FAMILIES | EXPERTS | CLASSIC | MODERN | ENCODERS | SEQ2SEQ | IMAGES)[family]
    fields = TINY | layers | own | more
    left_out = {name for name in TINY if family in MODERN | EXPERTS and fields[name] is None}
    left_out |= {name for name in LACKS.get(family, ()) if family not in SEQ2SEQ or name not in own | more}
    return {name: value for name, value in fields.items() if name not in left_out}


LACKED: dict[str, str] = {}  # families that the installed transformers does not know, and the error that says so
for _family in FAMILIES | EXPERTS | CLASSIC | MODERN | ENCODERS | SEQ2SEQ | IMAGES:
    # transformers imports a family when it is first asked for, which takes a second or more. The ranks
    # of `spawn` are forked from a process that has imported this module: they find it done.
    try:
        config_from_dict(fields_of(_family))
    except UserError as error:
        if "is not known to transformers" not in str(error):
            raise
        LACKED[_family] = str(error)
LABELS = ("O", "B-X", "I-X", "B-Y", "I-Y")
ALL_LINEAR = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Run:
    """One run. rows is the global batch, whatever the layout: dp ranks and microbatches divide it."""

    family: str = "llama"
    tp: int = 1
    pp: int = 1
    cp: int = 1
    chunks: int = 1
    lanes: bool = False
    sequence_parallel: bool = False
    exchange: bool = False
    recompute: str | tuple[str, ...] = "none"
    tile: int = 0
    offloaded: frozenset[int] = frozenset()
    schedule: str = "1f1b"
    partition_method: str = "uniform"
    custom_partition: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    lora: dict = field(default_factory=lambda: dict(ALL_LINEAR))
    model: dict = field(default_factory=dict)
    steps: int = 2
    rows: int = 4
    micro_batch_rows: int = 1
    seq_length: int = 24
    source_length: int = 32
    seed: int = 7
    task: str = "CAUSAL_LM"
    # Adam divides each gradient by its size: where that is near zero, rounding grows to a share of this rate.
    learning_rate: float = 1e-2
    base_format: str = "dense"
    loraplus_lr_ratio: float = 1.0
    weights: tuple[float, ...] = ()  # of labels, in turn along each document

    def on(self, **layout) -> Run:
        return replace(self, **layout)

    def short(self, processes: int, steps: int = 1) -> Run:
        """On so many processes, with no more than shows that a model is cut rightly: a second microbatch only where
        stages take turns, and one step, for what further ones show, masks and moments, is of no family.

        A small rate: Adam divides a gradient by its size, and where that is near zero rounding grows to a share of it.
        """
        replicas = processes // (self.tp * self.pp * self.cp)
        microbatches = 2 if self.pp > 1 and replicas == 1 else 1
        return self.on(steps=steps, rows=replicas * self.micro_batch_rows * microbatches, learning_rate=1e-4)


@dataclass(frozen=True)
class Outcome:
    """What one rank saw.

    losses, norms, skipped  of each step
    evaluation              the loss of the first step's rows after the last step, without dropout
    moved                   by how much each adapter moved at most from where it began
    adapters, gradients     of this rank after the last step, each with its place in the whole
    """

    losses: list[float]
    norms: list[float]
    evaluation: float
    skipped: list[str | None]
    moved: dict[str, float]
    adapters: dict[str, tuple[Split, torch.Tensor]]
    gradients: dict[str, tuple[Split, torch.Tensor]]


def whole_tensor(name: str, shape: Sequence[int], scale: float) -> torch.Tensor:
    """A random float64 tensor that depends on its name alone."""
    return _drawn(name, tuple(shape), scale).clone()


@functools.lru_cache(2048)  # families share many names and shapes; to draw them is a tenth of a short run
def _drawn(name: str, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    return values + 1.0 if name.lower().endswith("norm.weight") else values


@dataclass(frozen=True)
class RandomWeight:
    """A weight of random values, as a file would hold it (a megalora.parallel.base.WeightSource)."""

    whole: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def copy(self, index: tuple[slice, ...], out: torch.Tensor) -> None:
        out.copy_(self.whole[index])

    def stored(self) -> None:
        return None


def fill(stage: Stage) -> None:
    """Random base weights, initial adapters, a B that is not zero, and images that are drawn from their names."""
    stage.reset_adapters(seed=11)
    if stage.config.prefix is not None:
        shape = (3, *2 * (stage.config.prefix.vision.image_size,))
        stage.read_pictures(lambda picture: whole_tensor(picture.digest, shape, 1.0))
    with torch.no_grad():
        parameters = dict(stage.named_parameters(remove_duplicate=False))
        for name, split in named_splits(stage).items():
            if name.endswith("lora_A.weight"):
                continue
            tied = stage.config.head.tied and name == stage.config.head.weight
            source = stage.config.embedding.weight if tied else name
            whole = whole_tensor(source, split.global_shape, 0.15)
            if name in parameters:
                parameters[name].copy_(split.slice(whole))
            else:  # quantised as it is filled
                stage.get_submodule(name.removesuffix(".weight")).fill_weight(RandomWeight(whole))


def rows_of(run: Run, config: ModelSpec):
    """Packed rows of random documents, about two steps' worth of them."""
    vocab_size = config.vocab_size
    generator = torch.Generator().manual_seed(run.seed)
    documents: list[Sample] = []
    if config.encoder is not None:
        return pairs_of(run, config, generator)
    for _ in range(5 * run.rows):
        room = run.seq_length - (0 if config.prefix is None else config.prefix.tokens)
        length = int(torch.randint(3, room, (), generator=generator))
        ids = torch.randint(0, vocab_size, (length,), generator=generator)
        labels = torch.where(torch.arange(length) >= length // 3, ids, -100)
        sample = Sample(ids.numpy().astype("int32"), labels.numpy().astype("int32"))
        if run.weights:
            weights = np.resize(np.float32(run.weights), length) * (sample.labels != -100)
            sample = replace(sample, weights=weights)
        sample = behind_image(sample, config, len(documents))
        documents.append(sample if run.task == "CAUSAL_LM" else classified(sample, config, run.task))
    bins = pack([len(d.input_ids) for d in documents], run.seq_length)
    return build_rows(documents, bins, run.seq_length, 0)


def pairs_of(run: Run, config: ModelSpec, generator: torch.Generator):
    """Packed rows of random sources and targets."""
    documents = []
    for _ in range(5 * run.rows):
        limits = (run.source_length, run.seq_length)
        source, target = (int(torch.randint(2, length // 2, (), generator=generator)) for length in limits)
        ids = torch.randint(0, config.vocab_size, (source + target,), generator=generator)
        labels = torch.where(torch.arange(len(ids)) >= source, ids, -100)
        sample = Sample(ids.numpy().astype("int32"), labels.numpy().astype("int32"))
        documents.append(behind_image(sample, config, len(documents)))
    sides = Sides(run.source_length, config.encoder.start)
    lengths = Sides.lengths(Documents.of(documents, range(len(documents))))
    bins = pack_sides(lengths, (run.source_length, run.seq_length))
    assert max(map(len, bins)) > 1
    return build_rows(documents, bins, run.seq_length, 0, sides)


def behind_image(sample: Sample, config: ModelSpec, number: int) -> Sample:
    """The same behind the tokens of one of a few images, where the model reads images."""
    if config.prefix is None:
        return sample
    tokens = config.prefix.tokens
    ids = np.concatenate([np.full(tokens, config.prefix.placeholder, np.int32), sample.input_ids])
    labels = np.concatenate([np.full(tokens, -100, np.int32), sample.labels])
    return Sample(ids, labels, picture=Picture(f"{number % 3}.png", f"image {number % 3}", tokens))


def classified(sample: Sample, config: ModelSpec, task: str) -> Sample:
    """The same tokens, with classes made of them at the labelled ones, or at the one that the head of a text reads."""
    ids, kept = sample.input_ids, sample.labels != -100
    if task == "SEQ_CLS":
        kept = np.arange(len(ids)) == (len(ids) - 1 if config.causal else 0)
    columns = {name: (np.arange(len(ids)) * 3 // len(ids) > 1).astype("int32") for name in config.columns}
    if "boxes" in columns:
        corners = (np.arange(2 * len(ids)).reshape(-1, 2) * 37 + ids[:, None]) % 500
        columns["boxes"] = np.concatenate([corners, corners + 1 + ids[:, None] % 400], 1).astype("int32")
    columns |= {"classes": np.where(kept, (ids + 7 * np.arange(len(ids))) % len(LABELS), -100).astype("int32")}
    return Sample(ids, np.full_like(sample.labels, -100), columns)


def train(rank: int, world_size: int, run: Run) -> Outcome:
    """Runs `run` on this rank of `world_size`."""
    mesh = build_mesh(rank, world_size, run.tp, run.pp, cp=run.cp)
    config = config_from_dict(fields_of(run.family, **run.model))
    run = run if config.encoder is None else run.on(task="SEQ_2_SEQ_LM")
    config = config.for_task(run.task, LABELS)
    lora = resolve_lora(LoraConfig.from_dict(run.lora | {"task_type": run.task}), config)
    exchange = Exchange(mesh.tp, SharedMemory(mesh.tp)) if run.exchange else None
    base = BaseFormat(run.base_format)
    place = Placement(mesh.tp, run.sequence_parallel, run.dtype, run.device, exchange, base, mesh.cp)
    work = Workload(
        run.micro_batch_rows, run.seq_length, element=run.dtype.itemsize, sequence_parallel=run.sequence_parallel,
        recompute=run.recompute, tile=run.tile, offloaded=run.offloaded,
        context_parallel=run.cp, source_length=run.source_length if config.encoder is not None else 0,
    )  # fmt: skip
    settings = EngineSettings(
        work, lambda step: run.learning_rate, partition_method=run.partition_method,
        custom_partition=run.custom_partition, uneven_heads=config.num_attention_heads % run.tp != 0,
        schedule=run.schedule, chunks=run.chunks,
        lanes=run.lanes, seed=run.seed, cuda_graphs=False, optimizer={"loraplus_lr_ratio": run.loraplus_lr_ratio},
    )  # fmt: skip
    engine = build_trainer(config, mesh, lora, place, settings, fill)
    trainer, parameters, splits = engine.trainer, engine.parameters, engine.splits
    microbatches = run.rows // (mesh.dp.size * run.micro_batch_rows)
    loader = Loader(
        rows_of(run, config), micro_batch_rows=run.micro_batch_rows, num_microbatches=microbatches,
        dp_rank=mesh.dp.rank, dp_size=mesh.dp.size, seed=run.seed, cp_rank=mesh.cp.rank, cp_size=mesh.cp.size,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in parameters.items()}
    results = [trainer.step(step, loader.step(step)) for step in range(run.steps)]
    return Outcome(
        [r.loss for r in results],
        [r.grad_norm for r in results],
        trainer.evaluate([loader.step(0)]),
        [r.skipped for r in results],
        {name: (p.detach() - before[name]).abs().max().item() for name, p in parameters.items()},
        {name: (splits[name], p.detach().clone()) for name, p in parameters.items()},
        {name: (splits[name], p.grad.clone()) for name, p in parameters.items()},
    )


def train_each(rank: int, world_size: int, runs: Sequence[Run]) -> list[Outcome]:
    """Several runs, one after another, on the same processes: to start them takes longer than a run."""
    return [train(rank, world_size, run) for run in runs]


def reference(run: Run) -> Outcome:
    """`run` on one process without any of the means of a layout: what every layout of it must give.

    Asserts that it is worth comparing with: finite, no step skipped, every adapter with a gradient and moved.
    """
    plain = run.on(
        tp=1, pp=1, cp=1, chunks=1, lanes=False, sequence_parallel=False, exchange=False, recompute="none",
        tile=0, offloaded=frozenset(), schedule="1f1b", partition_method="uniform", custom_partition=None,
        micro_batch_rows=1,
    )  # fmt: skip
    outcome = _references.get(repr(plain))
    if outcome is None:
        outcome = _references[repr(plain)] = train(0, 1, plain)
    assert outcome.skipped == [None] * run.steps, outcome.skipped
    assert all(map(math.isfinite, [*outcome.losses, *outcome.norms, outcome.evaluation]))
    assert all(gradient.abs().max() > 1e-9 for _, gradient in outcome.gradients.values())
    assert all(moved > 0.1 * run.learning_rate for moved in outcome.moved.values()), outcome.moved
    return outcome


_references: dict[str, Outcome] = {}


def in_file_order(split: Split, part: torch.Tensor) -> torch.Tensor:
    """The whole tensor that one process holds, as the file has it: fused rows lie in another order in memory."""
    whole = torch.empty(split.global_shape, dtype=part.dtype)
    split.put(whole, part)
    return whole


def largest_difference(reference: Outcome, outcomes: list[Outcome]) -> float:
    """Largest absolute difference between one process and any rank of a layout, over all of an Outcome.

    Not a number counts as infinite. Asserts that every adapter element of the reference is held by some rank.
    """
    differences = []
    covered = {name: torch.zeros_like(whole) for name, (_, whole) in reference.adapters.items()}
    for outcome in outcomes:
        assert outcome.skipped == reference.skipped, outcome.skipped
        ours = [*outcome.losses, *outcome.norms, outcome.evaluation]
        theirs = [*reference.losses, *reference.norms, reference.evaluation]
        differences += [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        for ours, theirs in (
            (outcome.adapters, reference.adapters),
            (outcome.gradients, reference.gradients),
        ):
            for name, (split, part) in ours.items():
                if part.numel():
                    whole = in_file_order(*theirs[name])
                    differences.append((part - split.slice(whole)).abs().max().item())
                split.put(covered[name], torch.ones_like(part))
    assert all(c.all() for c in covered.values()), "a part of an adapter is on no rank"
    return max(d if math.isfinite(d) else math.inf for d in differences)


def check_runs(world_size: int, runs: Sequence[Run], tolerance: float = 1e-12) -> None:
    """Assert that so many processes, started once for all runs, give the numbers of one."""
    ranks = spawn(train_each, world_size, runs, timeout=600 + 20 * len(runs))
    differences = {
        repr(run): largest_difference(reference(run), list(outcomes))
        for run, outcomes in zip(runs, zip(*ranks, strict=True), strict=True)
    }
    apart = {run: difference for run, difference in differences.items() if not difference <= tolerance}
    assert not apart, f"{world_size} processes"


def check_all(cases: Iterable[tuple[Run, int]], tolerance: float = 1e-12) -> None:
    """The same for (run, dp)."""
    by_size = defaultdict(list)
    for run, dp in cases:
        by_size[run.tp * run.pp * run.cp * dp].append(run)
    for size, runs in by_size.items():
        check_runs(size, runs, tolerance)
