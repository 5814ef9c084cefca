"""config.json of published decoders of today, without what only says how text is generated; and their parameters."""

_GEMMA2 = {
    "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid", "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000, "pad_token_id": 0,
}  # fmt: skip
_GRANITE = {
    "model_type": "granite", "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
    "embedding_multiplier": 12.0, "hidden_act": "silu", "logits_scaling": 16.0, "max_position_embeddings": 131072,
    "mlp_bias": False, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5e6,
    "tie_word_embeddings": True, "vocab_size": 49155, "num_hidden_layers": 40, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
_STARCODER = {
    "model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"], "activation_function": "gelu",
    "attention_dropout": 0.1, "attention_softmax_in_fp32": True, "embedding_dropout": 0.1, "residual_dropout": 0.1,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-05, "norm_epsilon": 1e-05, "norm_type": "layer_norm",
    "mlp_type": "default", "max_position_embeddings": 16384, "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True, "sliding_window": 4096, "use_bias": True, "vocab_size": 49152, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
_PHI3 = {
    "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "attention_dropout": 0.0, "embd_pdrop": 0.0,
    "resid_pdrop": 0.0, "hidden_act": "silu", "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "bos_token_id": 1, "eos_token_id": 32000,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_GLM = {
    "attention_bias": True, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 13696, "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 151552, "pad_token_id": 151329, "max_position_embeddings": 32768,
}  # fmt: skip
_OLMO = {
    "model_type": "olmo", "architectures": ["OlmoForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "clip_qkv": None, "hidden_act": "silu", "max_position_embeddings": 2048, "pad_token_id": 1, "pretraining_tp": 1,
    "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 50304,
}  # fmt: skip
_OLMO2 = {
    "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352, "pad_token_id": 100277,
}  # fmt: skip


_HYBRID = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128,
    "mamba_expand": 2, "mamba_n_groups": 1, "mamba_proj_bias": False, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16",
    "use_cache": True,
}  # fmt: skip
_GRANITE4 = _HYBRID | {
    "model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"], "bos_token_id": 100257,
    "attention_multiplier": 0.015625, "embedding_multiplier": 12, "eos_token_id": 100257, "init_method": "mup",
    "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)], "logits_scaling": 8,
    "max_position_embeddings": 131072, "normalization_function": "rmsnorm", "num_experts_per_tok": 0,
    "num_local_experts": 0, "output_router_logits": False, "pad_token_id": 100256, "position_embedding_type": "nope",
    "residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 10000, "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": True, "vocab_size": 100352,
}  # fmt: skip


_NEMOTRON = {
    "model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "chunk_size": 128, "conv_kernel": 4, "expand": 2, "hidden_dropout": 0.0,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "mamba_hidden_act": "silu", "mamba_proj_bias": False,
    "mlp_bias": False, "mlp_hidden_act": "relu2", "n_groups": 8, "num_logits_to_keep": 1, "pad_token_id": 0,
    "rescale_prenorm_residual": True, "residual_in_fp32": False, "sliding_window": None, "ssm_state_size": 128,
    "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256, "torch_dtype": "bfloat16", "use_bias": False,
    "use_cache": True, "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 131072,
}  # fmt: skip


def _lfm2(inner: int, **more: object) -> dict:
    """inner: of all MLPs, before transformers adjusts it."""
    return {
        "model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": True,
        "block_ff_dim": inner, "block_ffn_dim_multiplier": 1.0, "block_mlp_init_scale": 1.0, "block_multiple_of": 256,
        "block_norm_eps": 1e-05, "block_out_init_scale": 1.0, "block_use_swiglu": True, "block_use_xavier_init": True,
        "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": False, "conv_use_xavier_init": True, "eos_token_id": 7,
        "initializer_range": 0.02, "max_position_embeddings": 128000, "norm_eps": 1e-05, "num_hidden_layers": 16,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14], "num_key_value_heads": 8, "pad_token_id": 0, "rope_theta": 1e6,
        "torch_dtype": "bfloat16", "use_cache": True, "use_pos_enc": True, "vocab_size": 65536, **more,
    }  # fmt: skip


def _lfm2_of(hidden: int, heads: int) -> dict:
    return {
        "block_dim": hidden, "conv_dim": hidden, "conv_dim_out": hidden, "hidden_size": hidden,
        "num_attention_heads": heads, "num_heads": heads,
    }  # fmt: skip


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }  # fmt: skip


def _qwen3_5(hidden: int, inner: int, layers: int, heads: int, values: int) -> dict:
    """Qwen3.5 with so many heads of attention, and of linear attention's values."""
    return {
        "model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056,
        "video_token_id": 248057, "vision_start_token_id": 248053, "vision_end_token_id": 248054,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_5_text", "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
            "dtype": "bfloat16", "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
            "initializer_range": 0.02, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
            "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
            "linear_num_value_heads": values, "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32",
            "max_position_embeddings": 262144, "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
            "rms_norm_eps": 1e-06, "vocab_size": 248320, **_sizes(hidden, inner, layers, heads, 4),
            "rope_parameters": {
                "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
                "rope_theta": 10000000, "rope_type": "default",
            },
        },
        "vision_config": {"model_type": "qwen3_5", "depth": 27, "hidden_size": 1152, "out_hidden_size": hidden},
    }  # fmt: skip


_GEMMA = {
    "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "head_dim": 256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "vocab_size": 256000, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "gemma-2b": (_GEMMA | _sizes(2048, 16384, 18, 8, 1) | {"hidden_act": "gelu"}, 2_506_172_416),
    "gemma-7b": (
        _GEMMA
        | _sizes(3072, 24576, 28, 16, 16)
        | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
        8_537_680_896,
    ),
    "gemma-2-2b": (_GEMMA2 | _sizes(2304, 9216, 26, 8, 4) | {"query_pre_attn_scalar": 256}, 2_614_341_888),
    "gemma-2-9b": (_GEMMA2 | _sizes(3584, 14336, 42, 16, 8) | {"query_pre_attn_scalar": 256}, 9_241_705_984),
    "gemma-2-27b": (
        _GEMMA2 | _sizes(4608, 36864, 46, 32, 16) | {"query_pre_attn_scalar": 144, "head_dim": 128}, 27_227_128_320,
    ),
    "gemma-3-1b-it": (
        {
            "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "cache_implementation": "hybrid", "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 32768, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
            "sliding_window_pattern": 6, "vocab_size": 262144, "pad_token_id": 0, **_sizes(1152, 6912, 26, 4, 1),
        },
        999_885_952,
    ),
    "granite-3.1-8b-base": (
        _GRANITE
        | {
            "hidden_size": 4096, "intermediate_size": 12800, "attention_multiplier": 0.0078125, "rope_theta": 1e7,
        },
        8_170_848_256,
    ),
    "granite-3.1-2b-base": (
        _GRANITE
        | {
            "hidden_size": 2048, "intermediate_size": 8192, "attention_multiplier": 0.015625, "logits_scaling": 8.0,
        },
        2_533_531_648,
    ),
    "c4ai-command-r-v01": (
        {
            "model_type": "cohere", "architectures": ["CohereForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "hidden_act": "silu", "layer_norm_eps": 1e-05, "logit_scale": 0.0625,
            "max_position_embeddings": 8192, "model_max_length": 131072, "rope_theta": 8000000.0, "use_qk_norm": False,
            "vocab_size": 256000, "pad_token_id": 0, "bos_token_id": 5, **_sizes(8192, 22528, 40, 64, 64),
        },
        34_980_831_232,
    ),
    "c4ai-command-r7b-12-2024": (
        {
            "model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "cache_implementation": "hybrid", "head_dim": 128, "hidden_act": "silu",
            "layer_norm_eps": 1e-05, "layer_switch": 4, "logit_scale": 0.25, "max_position_embeddings": 132096,
            "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
            "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0, "sliding_window": 4096,
            "sliding_window_pattern": 4, "use_embedding_sharing": True, "use_gated_activation": True,
            "use_parallel_block": True, "use_parallel_embedding": True, "vocab_size": 256000, "pad_token_id": 0,
            "bos_token_id": 5, **_sizes(4096, 14336, 32, 32, 8),
        },
        8_028_033_024,
    ),
    "OLMo-2-1124-7B": (_OLMO2 | _sizes(4096, 11008, 32, 32, 32), 7_298_617_344),
    "OLMo-2-1124-13B": (_OLMO2 | _sizes(5120, 13824, 40, 40, 40), 13_716_198_400),
    "Olmo-3-1025-7B": (
        _OLMO2
        | _sizes(4096, 11008, 32, 32, 32)
        | {
            "model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "max_position_embeddings": 65536,
            "sliding_window": 4096, "vocab_size": 100278,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32,
                "beta_slow": 1, "attention_factor": 1.2079441541679836,
            },
        },
        7_298_011_136,
    ),
    "SmolLM3-3B": (
        {
            "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "hidden_act": "silu", "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
            "pad_token_id": 128004, **_sizes(2048, 11008, 36, 16, 4),
        },
        3_075_098_624,
    ),
    "starcoder2-3b": (
        _STARCODER | _sizes(3072, 12288, 30, 24, 2) | {"rope_theta": 999999.4420358813}, 3_030_371_328,
    ),
    "starcoder2-7b": (_STARCODER | _sizes(4608, 18432, 32, 36, 4) | {"rope_theta": 1e6}, 7_173_923_840),
    "starcoder2-15b": (
        _STARCODER | _sizes(6144, 24576, 40, 48, 4) | {"rope_theta": 100000, "tie_word_embeddings": False},
        15_957_889_024,
    ),
    "Minitron-4B-Base": (
        {
            "model_type": "nemotron", "architectures": ["NemotronForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "relu2", "max_position_embeddings": 4096,
            "mlp_bias": False, "norm_eps": 1e-05, "partial_rotary_factor": 0.5, "rope_theta": 10000,
            "tie_word_embeddings": False, "vocab_size": 256000, **_sizes(3072, 9216, 32, 24, 8),
        },
        4_190_509_056,
    ),
    "glm-4-9b-chat-hf": (
        _GLM
        | {
            "model_type": "glm", "architectures": ["GlmForCausalLM"], "rms_norm_eps": 1.5625e-07,
            "max_position_embeddings": 131072,
        },
        9_399_951_360,
    ),
    "GLM-4-9B-0414": (_GLM | {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"]}, 9_400_279_040),
    "GLM-4-32B-0414": (
        _GLM
        | _sizes(6144, 23040, 61, 48, 2)
        | {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "attention_bias": False},
        32_566_081_536,
    ),
    "EXAONE-4.0-1.2B": (
        {
            "model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0, "head_dim": 64,
            "hidden_act": "silu", "layer_types": ["full_attention"] * 30, "max_position_embeddings": 65536,
            "rms_norm_eps": 1e-05, "rope_theta": 1000000, "sliding_window": None, "sliding_window_pattern": None,
            "tie_word_embeddings": True, "vocab_size": 102400, **_sizes(2048, 4096, 30, 32, 8),
            "rope_scaling": {
                "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        },
        1_279_391_488,
    ),
    "stablelm-2-1_6b": (
        {
            "model_type": "stablelm", "architectures": ["StableLmForCausalLM"], "attention_dropout": 0.0,
            "hidden_act": "silu", "hidden_dropout": 0.0, "layer_norm_eps": 1e-05, "max_position_embeddings": 4096,
            "partial_rotary_factor": 0.25, "qk_layernorm": False, "rope_theta": 10000, "tie_word_embeddings": False,
            "use_parallel_residual": False, "use_qkv_bias": True, "vocab_size": 100352,
            **_sizes(2048, 5632, 24, 32, 32),
        },
        1_644_515_328,
    ),
    "stablelm-2-12b": (
        {
            "model_type": "stablelm", "architectures": ["StableLmForCausalLM"], "attention_dropout": 0.0,
            "hidden_act": "silu", "hidden_dropout": 0.0, "layer_norm_eps": 1e-05, "max_position_embeddings": 4096,
            "partial_rotary_factor": 0.25, "qk_layernorm": True, "rope_theta": 10000, "tie_word_embeddings": False,
            "use_parallel_residual": True, "use_qkv_bias": False, "vocab_size": 100352,
            **_sizes(5120, 13824, 40, 32, 8),
        },
        12_143_185_920,
    ),
    "Phi-3-mini-4k-instruct": (
        _PHI3
        | _sizes(3072, 8192, 32, 32, 32)
        | {"max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047, "vocab_size": 32064},
        3_821_079_552,
    ),
    "Phi-3.5-mini-instruct": (
        _PHI3
        | _sizes(3072, 8192, 32, 32, 32)
        | {
            "max_position_embeddings": 131072, "sliding_window": 262144, "vocab_size": 32064, "attention_bias": False,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
        },
        3_821_079_552,
    ),
    "phi-4": (
        _PHI3
        | _sizes(5120, 17920, 40, 40, 10)
        | {
            "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_theta": 250000,
            "rope_scaling": None, "sliding_window": None, "vocab_size": 100352, "attention_bias": False,
        },
        14_659_507_200,
    ),
    "internlm3-8b-instruct": (
        {
            "model_type": "internlm3", "architectures": ["InternLM3ForCausalLM"], "attention_dropout": 0.0,
            "auto_map": {"AutoConfig": "configuration_internlm3.InternLM3Config",
                         "AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"},
            "bias": False, "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 32768,
            "qkv_bias": False, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
            "rope_theta": 50000000, "tie_word_embeddings": False, "vocab_size": 128512,
            **_sizes(4096, 10240, 48, 32, 2),
        },
        8_804_241_408,
    ),
    "Seed-OSS-36B-Instruct": (
        {
            "model_type": "seed_oss", "architectures": ["SeedOssForCausalLM"], "attention_bias": True,
            "attention_dropout": 0.1, "attention_out_bias": False, "head_dim": 128, "hidden_act": "silu",
            "max_position_embeddings": 524288, "mlp_bias": False, "residual_dropout": 0.1, "rms_norm_eps": 1e-06,
            "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0, "tie_word_embeddings": False,
            "vocab_size": 155136, "pad_token_id": 1, **_sizes(5120, 27648, 64, 80, 8),
        },
        36_151_104_512,
    ),
    "ERNIE-4.5-0.3B-PT": (
        {
            "model_type": "ernie4_5", "architectures": ["Ernie4_5_ForCausalLM"], "head_dim": 128, "hidden_act": "silu",
            "auto_map": {"AutoConfig": "configuration_ernie4_5.Ernie4_5_Config",
                         "AutoModelForCausalLM": "modeling_ernie4_5.Ernie4_5_ForCausalLM"},
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000, "use_bias": False,
            "tie_word_embeddings": True, "vocab_size": 103424, "pad_token_id": 0, **_sizes(1024, 3072, 18, 16, 2),
        },
        360_748_032,
    ),
    "helium-1-preview-2b": (
        {
            "model_type": "helium", "architectures": ["HeliumForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 4096,
            "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-08, "rope_theta": 100000.0,
            "tie_word_embeddings": False, "vocab_size": 48000, "pad_token_id": 3, **_sizes(2560, 7040, 24, 20, 20),
        },
        2_172_643_840,
    ),
    "cwm": (
        {
            "model_type": "cwm", "architectures": ["CwmForCausalLM"], "attention_dropout": 0.0, "head_dim": 128,
            "hidden_act": "silu", "layer_types": ["full_attention", *["sliding_attention"] * 3] * 16,
            "max_position_embeddings": 131072, "mlp_bias": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
            "sliding_window": 8192, "tie_word_embeddings": False, "vocab_size": 128256,
            "rope_scaling": {
                "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            **_sizes(6144, 21504, 64, 48, 8),
        },
        32_581_097_472,
    ),
    "Ministral-3-8B-Base-2512, its text_config": (
        {
            "model_type": "ministral3", "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
            "max_position_embeddings": 262144, "rms_norm_eps": 1e-05, "sliding_window": None,
            "tie_word_embeddings": False, "vocab_size": 131072, **_sizes(4096, 14336, 34, 32, 8),
            "rope_parameters": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0,
                "rope_type": "yarn", "type": "yarn",
            },
        },
        8_489_553_920,
    ),
    "Hunyuan-MT-7B": (
        {
            "model_type": "hunyuan_v1_dense", "architectures": ["HunYuanDenseV1ForCausalLM"],
            "add_classification_head": False, "attention_bias": False, "attention_dropout": 0.0,
            "attention_head_dim": 128, "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 32768,
            "mlp_bias": False, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": True,
            "use_qk_norm": True, "use_rotary_pos_emb": True, "vocab_size": 128256, "pad_token_id": 0,
            "rope_scaling": {
                "alpha": 100000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                "mscale_all_dim": 1.0, "type": "dynamic",
            },
            **_sizes(4096, 14336, 32, 32, 8),
        },
        7_504_932_864,
    ),
    "OLMo-1B-hf": (_OLMO | _sizes(2048, 8192, 16, 16, 16) | {"tie_word_embeddings": True}, 1_176_764_416),
    "OLMo-7B-hf": (_OLMO | _sizes(4096, 11008, 32, 32, 32), 6_888_095_744),
    "Apertus-8B-Instruct-2509": (  # with the four numbers of each activation
        {
            "model_type": "apertus", "architectures": ["ApertusForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "hidden_act": "xielu", "hidden_dropout": 0.0, "max_position_embeddings": 65536,
            "mlp_bias": False, "post_norm": False, "qk_norm": True, "rms_norm_eps": 1e-05, "rope_theta": 12000000,
            "tie_word_embeddings": False, "vocab_size": 131072, "pad_token_id": 3,
            "rope_scaling": {
                "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3", "type": "llama3",
            },
            **_sizes(4096, 21504, 32, 32, 8),
        },
        8_053_338_240,
    ),
    "HyperCLOVAX-SEED-Think-14B": (
        {
            "model_type": "hyperclovax", "architectures": ["HyperCLOVAXForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "attention_multiplier": 0.0078125, "embedding_multiplier": 10.0,
            "auto_map": {"AutoConfig": "configuration_hyperclovax.HyperCLOVAXConfig",
                         "AutoModelForCausalLM": "modeling_hyperclovax.HyperCLOVAXForCausalLM"},
            "end_token_id": 100257, "head_dim": 128, "hidden_act": "silu", "logits_scaling": 0.125,
            "max_position_embeddings": 131072, "mlp_bias": False, "pretraining_tp": 1, "residual_multiplier": 1.0,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 100000000, "tie_word_embeddings": False,
            "use_post_norm": True, "vocab_size": 110592, "pad_token_id": 100257, **_sizes(6144, 14336, 38, 48, 8),
        },
        14_748_112_896,
    ),
    "MiniCPM3-4B": (
        {
            "model_type": "minicpm3", "architectures": ["MiniCPM3ForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPM3Config",
                         "AutoModelForCausalLM": "modeling_minicpm.MiniCPM3ForCausalLM"},
            "dim_model_base": 256, "hidden_act": "silu", "kv_lora_rank": 256, "max_position_embeddings": 32768,
            "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "type": "longrope", "short_factor": [1.1] * 16, "long_factor": [1.1] * 16,
                "original_max_position_embeddings": 32768,
            },
            "scale_depth": 1.4, "scale_emb": 12, "vocab_size": 73448, **_sizes(2560, 6400, 62, 40, 40),
        },
        4_073_875_968,
    ),
    # Models that read images too: the parameters of their language models.
    "gemma-3-4b-it": (
        {
            "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
            "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
            "initializer_range": 0.02, "mm_tokens_per_image": 256, "torch_dtype": "bfloat16",
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
            },
            "vision_config": {
                "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
            },
        },
        3_880_263_168,
    ),
    "Mistral-Small-3.1-24B-Instruct-2503": (
        {
            "model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10,
            "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
            "torch_dtype": "bfloat16", "vision_feature_layer": -1,
            "text_config": {
                "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "initializer_range": 0.02,
                "max_position_embeddings": 131072, "model_type": "mistral", "rms_norm_eps": 1e-05,
                "rope_theta": 1e9, "sliding_window": None, "use_cache": True, "vocab_size": 131072,
                **_sizes(5120, 32768, 40, 32, 8),
            },
            "vision_config": {
                "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "gelu", "hidden_size": 1024,
                "image_size": 1540, "intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16,
                "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14, "rope_theta": 10000.0,
            },
        },
        23_572_403_200,
    ),
    "Qwen2.5-VL-7B-Instruct": (
        {
            "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
            "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655,
            "video_token_id": 151656, "hidden_act": "silu", "initializer_range": 0.02,
            "max_position_embeddings": 128000, "max_window_layers": 28, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064,
            "vision_config": {
                "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
                "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2, "temporal_patch_size": 2,
            },
            **_sizes(3584, 18944, 28, 28, 4),
        },
        7_615_616_512,
    ),
    "LFM2-350M": (_lfm2(6656, **_lfm2_of(1024, 16)), 354_483_968),
    "LFM2-700M": (_lfm2(10240, **_lfm2_of(1536, 24)), 742_489_344),
    "LFM2-1.2B": (_lfm2(12288, **_lfm2_of(2048, 32)), 1_170_340_608),
    "LFM2-2.6B": (
        _lfm2(
            10752, **_lfm2_of(2048, 32), block_auto_adjust_ff_dim=False, num_hidden_layers=30,
            full_attn_idxs=[2, 5, 9, 13, 17, 21, 25, 28],
        ),
        2_569_272_320,
    ),
    "granite-4.0-h-micro": (
        {**_GRANITE4, **_sizes(2048, 8192, 40, 32, 8), "mamba_n_heads": 64, "shared_intermediate_size": 8192},
        3_191_396_096,
    ),
    "granite-4.0-micro": (
        {
            **_GRANITE4, **_sizes(2560, 8192, 40, 40, 8), "layer_types": ["attention"] * 40, "mamba_n_heads": 80,
            "position_embedding_type": "rope", "rope_theta": 10000000, "shared_intermediate_size": 8192,
        },
        3_402_836_480,
    ),
    "granite-4.0-h-tiny": (
        {
            **_GRANITE4, **_sizes(1536, 512, 40, 12, 4), "mamba_n_heads": 48, "num_experts_per_tok": 6,
            "num_local_experts": 64, "shared_intermediate_size": 1024,
        },
        6_939_037_248,
    ),
    "granite-4.0-h-small": (
        {
            **_GRANITE4, **_sizes(4096, 768, 40, 32, 8), "mamba_n_heads": 128, "num_experts_per_tok": 10,
            "num_local_experts": 72, "shared_intermediate_size": 1536,
        },
        32_207_337_984,
    ),
    "Bamba-9B-v2": (
        {
            **_HYBRID, **_sizes(4096, 14336, 32, 32, 8), "model_type": "bamba", "architectures": ["BambaForCausalLM"],
            "attn_layer_indices": [9, 18, 27], "attn_rotary_emb": 64, "mamba_n_heads": 128, "mlp_bias": False,
            "max_position_embeddings": 262144, "num_logits_to_keep": 1, "pad_token_id": 0, "vocab_size": 128256,
            "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
        },
        9_780_235_392,
    ),
    "Falcon-H1-0.5B-Instruct": (
        {
            **_HYBRID, "model_type": "falcon_h1", "architectures": ["FalconH1ForCausalLM"], "attn_layer_indices": None,
            "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375, "head_dim": 64,
            "embedding_multiplier": 5.656854249492381, "key_multiplier": 0.39062499999999994,
            "lm_head_multiplier": 0.0390625, "mamba_chunk_size": 128, "mamba_d_ssm": 1536, "mamba_n_heads": 24,
            "mamba_norm_before_gate": False, "mamba_rms_norm": False, "mamba_use_mlp": True, "mlp_bias": False,
            "max_position_embeddings": 16384, "mlp_multipliers": [0.8838834764831844, 0.5859375],
            "projectors_bias": False, "rope_scaling": None, "rope_theta": 100000000000.0, "ssm_in_multiplier": 1.25,
            "ssm_multipliers": [
                0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738,
            ],
            "ssm_out_multiplier": 0.23570226039551587, "tie_word_embeddings": False, "vocab_size": 32784,
            **_sizes(1024, 2048, 36, 8, 2),
        },
        521_411_104,
    ),
    "NVIDIA-Nemotron-Nano-9B-v2": (
        {
            **_NEMOTRON, **_sizes(4480, 15680, 56, 40, 8), "head_dim": 128, "mamba_head_dim": 80,
            "mamba_num_heads": 128, "max_position_embeddings": 131072,
            "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        },
        8_888_227_328,
    ),
    "Nemotron-H-8B-Base-8K": (
        {
            **_NEMOTRON, **_sizes(4096, 21504, 52, 32, 8), "attention_head_dim": 128, "mamba_head_dim": 64,
            "mamba_num_heads": 128, "max_position_embeddings": 8192,
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        },
        8_100_852_736,
    ),
    "Qwen3.5-9B": (_qwen3_5(4096, 12288, 32, 16, 32), 8_953_803_264),
    "Qwen3.5-27B": (_qwen3_5(5120, 17408, 64, 24, 48), 26_895_998_464),
}  # fmt: skip
