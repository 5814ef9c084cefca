"""config.json of published models of the older decoders, as their makers wrote them, with the number of parameters.

Fields that say nothing about the model (architectures, token ids, ...) are left out but for those that only these
files have. Parameters are those of the published weights, a tied head counted once.
"""

from __future__ import annotations

from typing import Any

_SUMMARY = {
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
}  # fmt: skip


def _gpt2(size: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 1024,
        "n_embd": size, "n_head": heads, "n_layer": layers, "n_positions": 1024, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, **_SUMMARY, **more,
    }  # fmt: skip


def _bigcode(size: int, layers: int, heads: int, positions: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt_bigcode", "architectures": ["GPTBigCodeForCausalLM"],
        "activation_function": "gelu_pytorch_tanh",
        "attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True, "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1, "inference_runner": 0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "max_batch_size": None, "max_sequence_length": None, "multi_query": True, "n_embd": size, "n_head": heads,
        "n_inner": 4 * size, "n_layer": layers, "n_positions": positions, "pad_key_length": True,
        "pre_allocate_kv_cache": False, "scale_attn_weights": True, "validate_runner_input": True, "vocab_size": vocab,
        **_SUMMARY, **more,
    }  # fmt: skip


def _neo(size: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "activation_function": "gelu_new",
        "attention_dropout": 0, "embed_dropout": 0, "resid_dropout": 0, "gradient_checkpointing": False,
        "attention_layers": ["global", "local"] * (layers // 2), "attention_types": [[["global", "local"],
        layers // 2]],
        "hidden_size": size, "initializer_range": 0.02, "intermediate_size": None, "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 2048, "num_heads": heads, "num_layers": layers, "vocab_size": 50257,
        "window_size": 256,
        **_SUMMARY, **more,
    }  # fmt: skip


def _codegen(size: int, layers: int, heads: int, rotary: int, vocab: int = 51200) -> dict[str, Any]:
    return {
        "model_type": "codegen", "architectures": ["CodeGenForCausalLM"], "activation_function": "gelu_new",
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "gradient_checkpointing": False,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 2048, "n_embd": size, "n_head": heads,
        "n_inner": None, "n_layer": layers, "n_positions": 2048, "rotary_dim": rotary, "scale_attn_weights": True,
        "tie_word_embeddings": False, "vocab_size": vocab, **_SUMMARY,
    }  # fmt: skip


def _bloom(size: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "bloom", "architectures": ["BloomForCausalLM"], "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "hidden_dropout": 0.0,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "n_embed": size,
        "n_inner": None, "n_layer": layers, "num_attention_heads": heads, "offset_alibi": 100, "pretraining_tp": 1,
        "skip_bias_add": True, "skip_bias_add_qkv": False, "unk_token_id": 0, "vocab_size": 250880, **more,
    }  # fmt: skip


def _opt(size: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "_remove_final_layer_norm": False,
        "activation_dropout": 0.0, "activation_function": "relu", "attention_dropout": 0.0,
        "do_layer_norm_before": True,
        "dropout": 0.1, "ffn_dim": 4 * size, "hidden_size": size, "init_std": 0.02, "layerdrop": 0.0,
        "max_position_embeddings": 2048, "num_attention_heads": heads, "num_hidden_layers": layers, "prefix": "</s>",
        "vocab_size": 50272, "word_embed_proj_dim": size, **more,
    }  # fmt: skip


def _mpt(size: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    attention = {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0, "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
    }  # fmt: skip
    return {
        "model_type": "mpt", "architectures": ["MPTForCausalLM"], "attn_config": attention | more.pop("attention", {}),
        "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
        "d_model": size, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4, "init_device": "cpu",
        "init_config": {"name": "kaiming_normal_", "fan_mode": "fan_in"}, "learned_pos_emb": True, "logit_scale": None,
        "max_seq_len": 2048, "n_heads": heads, "n_layers": layers, "no_bias": True,
        "norm_type": "low_precision_layernorm", "resid_pdrop": 0, "tokenizer_name": "EleutherAI/gpt-neox-20b",
        "verbose": 0, "vocab_size": 50432, **more,
    }  # fmt: skip


_FALCON = {
    "alibi": False, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "bias": False,
    "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "parallel_attn": True,
    "vocab_size": 65024,
}  # fmt: skip
_REMOTE = {
    "architectures": ["RWForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_RW.RWConfig", "AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
}
_GLM = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "modeling_chatglm.ChatGLMModel"},
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "ffn_hidden_size": 13696,
    "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128,
    "layernorm_epsilon": 1e-05, "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 32,
    "num_layers": 28, "original_rope": True, "padded_vocab_size": 65024, "post_layer_norm": True, "rmsnorm": True,
    "tie_word_embeddings": False,
}  # fmt: skip
_PHI = {
    "model_type": "phi", "architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "embd_pdrop": 0.0,
    "hidden_act": "gelu_new", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 24,
    "num_key_value_heads": None, "partial_rotary_factor": 0.5, "qk_layernorm": False, "resid_pdrop": 0.0,
    "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 51200,
}  # fmt: skip



def _internlm2(hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "attn_implementation": "eager",
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config",
                     "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "bias": False, "hidden_act": "silu", "hidden_size": hidden, "initializer_range": 0.02,
        "intermediate_size": inner, "max_position_embeddings": 32768, "num_attention_heads": heads,
        "num_hidden_layers": layers, "num_key_value_heads": kv, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 1000000, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 92544, **more,
    }  # fmt: skip


def _neox(hidden: int, layers: int, heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "hidden_size": hidden,
        "initializer_range": 0.02, "intermediate_size": 4 * hidden, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "num_attention_heads": heads, "num_hidden_layers": layers,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "use_cache": True,
        "use_parallel_residual": True, "vocab_size": vocabulary, **more,
    }  # fmt: skip


_DYNAMIC = {"type": "dynamic", "factor": 2.0}
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (_gpt2(768, 12, 12), 124_439_808),
    "gpt2-medium": (_gpt2(1024, 24, 16), 354_823_168),
    "gpt2-large": (_gpt2(1280, 36, 20), 774_030_080),
    "gpt2-xl": (_gpt2(1600, 48, 25, output_past=True), 1_557_611_200),
    "distilgpt2": (_gpt2(768, 6, 12), 81_912_576),
    "starcoder": (_bigcode(6144, 40, 48, 8192, 49152), 15_517_456_384),
    "santacoder": (_bigcode(2048, 24, 16, 2048, 49280), 1_124_886_528),
    "gpt-neo-125m": (_neo(768, 12, 12), 125_198_592),
    "gpt-neo-1.3B": (_neo(2048, 24, 16), 1_315_575_808),
    "gpt-neo-2.7B": (_neo(2560, 32, 20), 2_651_307_520),
    "gpt-j-6b": (
        _codegen(4096, 28, 16, 64, 50400) | {"model_type": "gptj", "architectures": ["GPTJForCausalLM"],
        "rotary": True},
        6_050_882_784,
    ),
    "codegen-350M": (_codegen(1024, 20, 16, 32), 356_712_448),
    "codegen-2B": (_codegen(2560, 32, 32, 64), 2_779_356_160),
    "codegen-6B": (_codegen(4096, 33, 16, 64), 7_064_213_504),
    "bloom-560m": (_bloom(1024, 24, 16), 559_214_592),
    "bloom-1b7": (_bloom(2048, 24, 16), 1_722_408_960),
    "bloom-7b1": (_bloom(4096, 30, 32), 7_069_016_064),
    "bloom": (_bloom(14336, 70, 112, seq_length=2048), 176_247_271_424),
    "opt-125m": (_opt(768, 12, 12), 125_239_296),
    "opt-350m": (_opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False), 331_196_416),
    "opt-1.3b": (_opt(2048, 24, 32), 1_315_758_080),
    "opt-6.7b": (_opt(4096, 32, 32), 6_658_473_984),
    "opt-30b": (_opt(7168, 48, 56), 29_974_540_288),
    "mpt-7b": (_mpt(4096, 32, 32), 6_649_286_656),
    "mpt-7b-storywriter": (
        _mpt(4096, 32, 32, max_seq_len=65536, attention={"clip_qkv": 6, "alibi_bias_max": 16}),
        6_649_286_656,
    ),
    "mpt-30b": (_mpt(7168, 48, 64, max_seq_len=8192), 29_957_200_896),
    "falcon-7b": (
        _FALCON | {"model_type": "falcon", "hidden_size": 4544, "multi_query": True,
        "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32},
        6_921_720_704,
    ),
    "falcon-7b, first form": (
        _FALCON | _REMOTE | {"model_type": "RefinedWebModel", "hidden_size": 4544, "multi_query": True, "n_head": 71,
        "n_layer": 32},
        6_921_720_704,
    ),
    "falcon-40b": (
        _FALCON | {"model_type": "falcon", "hidden_size": 8192, "multi_query": True,
        "new_decoder_architecture": True, "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8},
        41_303_293_952,
    ),
    "falcon-40b, first form": (
        _FALCON | _REMOTE | {"model_type": "RefinedWeb", "hidden_size": 8192, "n_head": 128, "n_head_kv": 8,
        "n_layer": 60},
        41_303_293_952,
    ),
    "falcon-rw-1b": (
        _FALCON | {"model_type": "falcon", "alibi": True, "bias": True, "hidden_size": 2048, "multi_query": False,
        "new_decoder_architecture": False, "num_attention_heads": 32, "num_hidden_layers": 24,
        "parallel_attn": False, "vocab_size": 50304},
        1_311_625_216,
    ),
    "falcon-11b": (
        _FALCON | {"model_type": "falcon", "activation": "gelu", "ff_factor": 4, "ffn_hidden_size": 16384,
        "hidden_size": 4096, "max_position_embeddings": 8192, "multi_query": True, "new_decoder_architecture": True,
        "num_attention_heads": 32, "num_hidden_layers": 60, "num_kv_heads": 8, "num_ln_in_parallel_attn": 1,
        "rope_theta": 500042.0, "rope_scaling": None, "tie_word_embeddings": False},
        11_102_822_400,
    ),
    "phi-1.5": (_PHI, 1_418_270_720),
    "phi-2": (
        _PHI | {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
        "partial_rotary_factor": 0.4, "resid_pdrop": 0.1},
        2_779_683_840,
    ),
    "chatglm2-6b": (_GLM | {"seq_length": 32768, "use_cache": True}, 6_243_584_000),
    "chatglm3-6b": (
        _GLM | {"seq_length": 8192, "vocab_size": 65024, "classifier_dropout": None, "pre_seq_len": None,
        "prefix_projection": False},
        6_243_584_000,
    ),
    "pythia-1.4b": (_neox(2048, 24, 16, 50304), 1_414_647_808),
    "pythia-6.9b": (_neox(4096, 32, 32, 50432), 6_857_302_016),
    "gpt-neox-20b": (_neox(6144, 44, 64, 50432, hidden_act="gelu_fast"), 20_554_567_680),
    "internlm2-1_8b": (_internlm2(2048, 8192, 24, 16, 8), 1_889_110_016),
    "internlm2-7b": (_internlm2(4096, 14336, 32, 32, 8), 7_737_708_544),
    "internlm2_5-7b-chat": (_internlm2(4096, 14336, 32, 32, 8, rope_scaling=_DYNAMIC), 7_737_708_544),
    "internlm2-20b": (_internlm2(6144, 16384, 48, 48, 8), 19_861_149_696),
    "btlm-3b-8k": (
        {
            "model_type": "btlm", "architectures": ["BTLMLMHeadModel"], "activation_function": "swiglu",
        "attn_pdrop": 0.0,
            "auto_map": {"AutoConfig": "configuration_btlm.BTLMConfig",
        "AutoModelForCausalLM": "modeling_btlm.BTLMLMHeadModel"},
            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.073, "layer_norm_epsilon": 1e-05,
            "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.2200000000000002, "mup_scale_qk_dot_by_d": True,
            "mup_width_scale": 0.1, "n_embd": 2560, "n_head": 32, "n_inner": 6826, "n_layer": 32, "n_positions": 8192,
            "position_embedding_type": "alibi", "reorder_and_upcast_attn": False,
            "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "vocab_size": 50257,
        },
        2_646_255_744,
    ),
}  # fmt: skip
