"""config.json of published dense llama, mistral, qwen2 and qwen3 models, without what only says how text is generated.
Each publisher's fields are given once, then what differs.

Written down from memory of what their makers published; sizes, lengths, eps and theta were compared with litgpt's table
(litgpt/config.py) for the models that it has. It lacks Yi, Sheared-LLaMA, vicuna, Amber, SOLAR, SmolLM, deepseek-llm,
-math and -coder, granite-code, OpenCoder, EuroLLM, Llama-Guard, Tulu, Minitron, Hermes; Mistral's Nemo, Small,
Codestral, Ministral and what others tuned of Mistral-7B; Qwen1.5, Qwen2 and Qwen3's embeddings. It has another length
for Mistral-Large.
"""

from typing import Any

Fields = dict[str, Any]


def _of(base: Fields, sizes: str, **more: Any) -> Fields:
    """sizes: hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads."""
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    return base | dict(zip(names, map(int, sizes.split()), strict=True)) | more


_EVERY: Fields = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True}
_LLAMA = _EVERY | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
    "pretraining_tp": 1, "rope_scaling": None, "attention_bias": False,
}  # fmt: skip
_LLAMA2 = {k: v for k, v in _LLAMA.items() if k not in ("attention_bias", "attention_dropout")}
_LLAMA2 |= {"vocab_size": 32000, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2}
_CODE = _LLAMA2 | {"vocab_size": 32016, "max_position_embeddings": 16384, "rope_theta": 1000000}
_LLAMA3 = _LLAMA | {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
_STRETCH = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
_LLAMA31 = _LLAMA3 | {"max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": _STRETCH}
_LLAMA32 = _LLAMA31 | {"rope_scaling": _STRETCH | {"factor": 32.0}, "tie_word_embeddings": True}
_SMOL = _LLAMA | {"vocab_size": 49152, "max_position_embeddings": 2048, "rope_theta": 10000.0}
_SMOL2 = _SMOL | {
    "max_position_embeddings": 8192, "rope_theta": 100000, "tie_word_embeddings": True, "is_llama_config": True,
    "rope_interleaved": False, "mlp_bias": False, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
}  # fmt: skip
_DEEPSEEK = _LLAMA | {"vocab_size": 102400, "max_position_embeddings": 4096, "rms_norm_eps": 1e-06}
_DEEPSEEK |= {"rope_theta": 10000.0}
_CODER = _LLAMA | {
    "vocab_size": 32256, "max_position_embeddings": 16384, "rms_norm_eps": 1e-06, "rope_theta": 100000,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
}  # fmt: skip
_YI = _LLAMA | {"vocab_size": 64000, "max_position_embeddings": 4096, "rope_theta": 5000000.0, "pad_token_id": 0}
_YI |= {"rms_norm_eps": 1e-06}
_OPEN = _LLAMA2 | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-06}
_FALCON3 = _LLAMA | {"vocab_size": 131072, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "head_dim": 256}
_FALCON3 |= {"rope_theta": 1000042, "mlp_bias": False}
_GRANITE = _LLAMA | {"vocab_size": 49152, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}

_MISTRAL = {
    **{k: v for k, v in _EVERY.items() if k != "attention_dropout"}, "architectures": ["MistralForCausalLM"],
    "model_type": "mistral", "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
_7B = "4096 14336 32 32 8"
_MISTRAL3 = _MISTRAL | {"attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
_NEMO = _MISTRAL3 | {"head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 1024000}
_SMALL3 = _NEMO | {"max_position_embeddings": 32768, "rope_theta": 100000000.0}

_QWEN = _EVERY | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False,
    "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip
_QWEN2 = _QWEN | {"max_position_embeddings": 131072, "sliding_window": 131072}
_TIED: Fields = {"tie_word_embeddings": True}
_BIG: Fields = {"vocab_size": 152064}
_DISTILL = _QWEN2 | {"rope_theta": 10000, "use_mrope": False, "sliding_window": 4096}
_QWEN3 = _EVERY | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip

CONFIGS: dict[str, Fields] = {
    # ---- llama
    "Llama-2-7b-hf": _of(_LLAMA2, "4096 11008 32 32 32"),
    "Llama-2-13b-hf": _of(_LLAMA2, "5120 13824 40 40 40"),
    "Llama-2-70b-hf": _of(_LLAMA2, "8192 28672 80 64 8"),
    "Llama-2-7b-chat-hf": _of(_LLAMA2, "4096 11008 32 32 32"),
    "CodeLlama-7b-hf": _of(_CODE, "4096 11008 32 32 32"),
    "CodeLlama-13b-hf": _of(_CODE, "5120 13824 40 40 40"),
    "CodeLlama-34b-hf": _of(_CODE, "8192 22016 48 64 8", vocab_size=32000),
    "CodeLlama-70b-hf": _of(_CODE, "8192 28672 80 64 8"),
    "Meta-Llama-3-8B": _of(_LLAMA3, _7B),
    "Meta-Llama-3-70B": _of(_LLAMA3, "8192 28672 80 64 8"),
    "Llama-3.1-8B": _of(_LLAMA31, _7B),
    "Llama-3.1-70B": _of(_LLAMA31, "8192 28672 80 64 8"),
    "Llama-3.1-405B": _of(_LLAMA31, "16384 53248 126 128 8"),
    "Llama-3.2-1B": _of(_LLAMA32, "2048 8192 16 32 8", head_dim=64),
    "Llama-3.2-3B": _of(_LLAMA32, "3072 8192 28 24 8", head_dim=128),
    "Llama-3.3-70B-Instruct": _of(_LLAMA31, "8192 28672 80 64 8", head_dim=128),
    "Llama-Guard-3-8B": _of(_LLAMA31, _7B),
    "Llama-3.1-Nemotron-70B-Instruct-HF": _of(_LLAMA31, "8192 28672 80 64 8", head_dim=128),
    "Llama-3.1-Tulu-3-8B": _of(_LLAMA31, _7B, vocab_size=128264, head_dim=128),
    "Llama-3.1-Minitron-4B-Width-Base": _of(_LLAMA31, "3072 9216 32 32 8", head_dim=128),
    "Hermes-3-Llama-3.1-8B": _of(_LLAMA31, _7B),
    "DeepSeek-R1-Distill-Llama-8B": _of(_LLAMA31, _7B),
    "DeepSeek-R1-Distill-Llama-70B": _of(_LLAMA31, "8192 28672 80 64 8", head_dim=128),
    "TinyLlama-1.1B-Chat-v1.0": _of(_LLAMA2, "2048 5632 22 32 4", max_position_embeddings=2048, rope_theta=10000.0),
    "Sheared-LLaMA-1.3B": _of(_LLAMA2, "2048 5504 24 16 16"),
    "Sheared-LLaMA-2.7B": _of(_LLAMA2, "2560 6912 32 20 20"),
    "vicuna-7b-v1.5": _of(_LLAMA2, "4096 11008 32 32 32"),
    "vicuna-7b-v1.5-16k": _of(
        _LLAMA2, "4096 11008 32 32 32", rope_scaling={"factor": 4.0, "type": "linear"}, max_sequence_length=16384
    ),
    "open_llama_3b": _of(_OPEN, "3200 8640 26 32 32"),
    "open_llama_7b": _of(_OPEN, "4096 11008 32 32 32"),
    "open_llama_13b": _of(_OPEN, "5120 13824 40 40 40"),
    "Amber": _of(_OPEN, "4096 11008 32 32 32"),
    "SOLAR-10.7B-v1.0": _of(_LLAMA2, "4096 14336 48 32 8", rope_theta=10000.0),
    "SmolLM-135M": _of(_SMOL, "576 1536 30 9 3", **_TIED),
    "SmolLM-360M": _of(_SMOL, "960 2560 32 15 5", **_TIED),
    "SmolLM-1.7B": _of(_SMOL, "2048 8192 24 32 32", **_TIED),
    "SmolLM2-135M": _of(_SMOL2, "576 1536 30 9 3"),
    "SmolLM2-360M": _of(_SMOL2, "960 2560 32 15 5"),
    "SmolLM2-1.7B": _of(_SMOL2, "2048 8192 24 32 32", rope_theta=130000),
    "deepseek-llm-7b-base": _of(_DEEPSEEK, "4096 11008 30 32 32"),
    "deepseek-llm-67b-base": _of(_DEEPSEEK, "8192 22016 95 64 8"),
    "deepseek-math-7b-instruct": _of(_DEEPSEEK, "4096 11008 30 32 32"),
    "deepseek-coder-1.3b-base": _of(_CODER, "2048 5504 24 16 16"),
    "deepseek-coder-6.7b-base": _of(_CODER, "4096 11008 32 32 32"),
    "deepseek-coder-33b-base": _of(_CODER, "7168 19200 62 56 8"),
    "Yi-6B": _of(_YI, "4096 11008 32 32 4"),
    "Yi-9B": _of(_YI, "4096 11008 48 32 4"),
    "Yi-34B": _of(_YI, "7168 20480 60 56 8"),
    "Yi-34B-200K": _of(_YI, "7168 20480 60 56 8", max_position_embeddings=200000, rope_theta=10000000.0),
    "Yi-1.5-9B-Chat": _of(_YI, "4096 11008 48 32 4"),
    "Yi-Coder-9B": _of(_YI, "4096 11008 48 32 4", max_position_embeddings=131072, rope_theta=10000000.0),
    "Falcon3-1B-Base": _of(_FALCON3, "2048 8192 18 8 4", max_position_embeddings=4096),
    "Falcon3-7B-Base": _of(_FALCON3, "3072 23040 28 12 4"),
    "Falcon3-10B-Base": _of(_FALCON3, "3072 23040 40 12 4"),
    "granite-3b-code-base-2k": _of(_GRANITE, "2560 10240 32 32 32", max_position_embeddings=2048, mlp_bias=True),
    "granite-8b-code-base-4k": _of(_GRANITE, "4096 14336 36 32 8", max_position_embeddings=4096, rope_theta=10000),
    "OpenCoder-8B-Base": _of(_LLAMA3, _7B, vocab_size=96640, mlp_bias=False),
    "EuroLLM-1.7B": _of(_LLAMA, "2048 5632 24 16 8", vocab_size=128000, max_position_embeddings=4096, mlp_bias=False),
    "salamandra-7b": _of(
        _LLAMA, "4096 11008 32 32 8", vocab_size=256000, max_position_embeddings=8192, rms_norm_eps=1e-06,
        mlp_bias=False,
    ),
    # ---- mistral
    "Mistral-7B-v0.1": _of(_MISTRAL, _7B),
    "Mistral-7B-Instruct-v0.1": _of(_MISTRAL, _7B),
    "Mistral-7B-Instruct-v0.2": _of(_MISTRAL3, _7B, vocab_size=32000),
    "Mistral-7B-v0.3": _of(_MISTRAL3, _7B),
    "Mathstral-7B-v0.1": _of(_MISTRAL3, _7B),
    "Codestral-22B-v0.1": _of(_MISTRAL3, "6144 16384 56 48 8"),
    "Mistral-Small-Instruct-2409": _of(_MISTRAL3, "6144 16384 56 48 8", head_dim=128),
    "Mistral-Large-Instruct-2407": _of(_MISTRAL3, "12288 28672 88 96 8", head_dim=128, max_position_embeddings=131072),
    "Mistral-Large-Instruct-2411": _of(_MISTRAL3, "12288 28672 88 96 8", head_dim=128, max_position_embeddings=131072),
    "Mistral-Nemo-Base-2407": _of(_NEMO, "5120 14336 40 32 8"),
    "Mistral-Nemo-Instruct-2407": _of(_NEMO, "5120 14336 40 32 8"),
    "Mistral-NeMo-Minitron-8B-Base": _of(_NEMO, "4096 11520 40 32 8", max_position_embeddings=8192),
    "Mistral-Small-24B-Base-2501": _of(_SMALL3, "5120 32768 40 32 8"),
    "Devstral-Small-2505": _of(_SMALL3, "5120 32768 40 32 8", max_position_embeddings=131072, rope_theta=1000000000.0),
    "Magistral-Small-2506": _of(_SMALL3, "5120 32768 40 32 8", max_position_embeddings=40960, rope_theta=1000000000.0),
    "Ministral-8B-Instruct-2410": _of(_SMALL3, "4096 12288 36 32 8", sliding_window=32768),
    "zephyr-7b-beta": _of(_MISTRAL, _7B, pad_token_id=2),
    "OpenHermes-2.5-Mistral-7B": _of(_MISTRAL, _7B, vocab_size=32002),
    "openchat-3.5-1210": _of(_MISTRAL, _7B, vocab_size=32002, max_position_embeddings=8192),
    "Starling-LM-7B-alpha": _of(_MISTRAL, _7B, vocab_size=32002, max_position_embeddings=8192),
    # ---- qwen2
    "Qwen1.5-0.5B": _of(_QWEN, "1024 2816 24 16 16", max_window_layers=21, **_TIED),
    "Qwen1.5-1.8B": _of(_QWEN, "2048 5504 24 16 16", max_window_layers=21),
    "Qwen1.5-4B": _of(_QWEN, "2560 6912 40 20 20", max_window_layers=21, rope_theta=5000000.0),
    "Qwen1.5-7B": _of(_QWEN, "4096 11008 32 32 32", max_window_layers=28),
    "Qwen1.5-14B": _of(_QWEN, "5120 13696 40 40 40", max_window_layers=35, **_BIG),
    "Qwen1.5-32B": _of(_QWEN, "5120 27392 64 40 8", max_window_layers=35, **_BIG),
    "Qwen1.5-72B": _of(_QWEN, "8192 24576 80 64 64", max_window_layers=70, **_BIG),
    "Qwen1.5-110B": _of(_QWEN, "8192 49152 80 64 8", max_window_layers=70, **_BIG),
    "CodeQwen1.5-7B": _of(
        _QWEN, "4096 13440 32 32 4", max_window_layers=28, vocab_size=92416, max_position_embeddings=65536,
        sliding_window=65536, rms_norm_eps=1e-05,
    ),
    "Qwen2-0.5B": _of(_QWEN2, "896 4864 24 14 2", max_window_layers=24, **_TIED),
    "Qwen2-1.5B": _of(_QWEN2, "1536 8960 28 12 2", max_window_layers=28, **_TIED),
    "Qwen2-7B": _of(_QWEN2, "3584 18944 28 28 4", max_window_layers=28, **_BIG),
    "Qwen2-72B": _of(_QWEN2, "8192 29568 80 64 8", max_window_layers=80, rms_norm_eps=1e-05, **_BIG),
    "Qwen2.5-0.5B": _of(_QWEN, "896 4864 24 14 2", max_window_layers=24, use_mrope=False, **_TIED),
    "Qwen2.5-1.5B-Instruct": _of(_QWEN, "1536 8960 28 12 2", max_window_layers=21, **_TIED),
    "Qwen2.5-3B": _of(_QWEN, "2048 11008 36 16 2", max_window_layers=36, use_mrope=False, **_TIED),
    "Qwen2.5-7B": _of(_QWEN2, "3584 18944 28 28 4", max_window_layers=28, use_mrope=False, **_BIG),
    "Qwen2.5-14B": _of(_QWEN2, "5120 13824 48 40 8", max_window_layers=48, rms_norm_eps=1e-05, **_BIG),
    "Qwen2.5-32B-Instruct": _of(_QWEN, "5120 27648 64 40 8", max_window_layers=70, sliding_window=131072, **_BIG),
    "Qwen2.5-72B-Instruct": _of(_QWEN, "8192 29568 80 64 8", max_window_layers=70, sliding_window=131072, **_BIG),
    "Qwen2.5-7B-Instruct with YaRN": _of(
        _QWEN, "3584 18944 28 28 4", max_window_layers=28, sliding_window=131072,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}, **_BIG,
    ),
    "Qwen2.5-7B-Instruct-1M": _of(
        _QWEN, "3584 18944 28 28 4", max_window_layers=28, max_position_embeddings=1010000, rope_theta=10000000.0,
        rms_norm_eps=1e-05,
        dual_chunk_attention_config={
            "chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144,
        }, **_BIG,
    ),
    "Qwen2.5-Coder-7B": _of(_QWEN, "3584 18944 28 28 4", max_window_layers=28, sliding_window=131072, **_BIG),
    "Qwen2.5-Coder-32B-Instruct": _of(_QWEN, "5120 27648 64 40 8", max_window_layers=70, **_BIG),
    "Qwen2.5-Math-1.5B": _of(
        _QWEN, "1536 8960 28 12 2", max_window_layers=21, max_position_embeddings=4096, rope_theta=10000,
        sliding_window=4096, use_mrope=False, **_TIED,
    ),
    "Qwen2.5-Math-7B": _of(
        _QWEN, "3584 18944 28 28 4", max_window_layers=28, max_position_embeddings=4096, rope_theta=10000,
        sliding_window=4096, use_mrope=False, **_BIG,
    ),
    "QwQ-32B": _of(
        _QWEN, "5120 27648 64 40 8", max_window_layers=64, max_position_embeddings=40960, rms_norm_eps=1e-05, **_BIG,
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": _of(_DISTILL, "1536 8960 28 12 2", max_window_layers=21),
    "DeepSeek-R1-Distill-Qwen-7B": _of(_DISTILL, "3584 18944 28 28 4", max_window_layers=28, **_BIG),
    # ---- qwen3
    "Qwen3-0.6B": _of(_QWEN3, "1024 3072 28 16 8", max_window_layers=28, **_TIED),
    "Qwen3-1.7B": _of(_QWEN3, "2048 6144 28 16 8", max_window_layers=28, **_TIED),
    "Qwen3-4B": _of(_QWEN3, "2560 9728 36 32 8", max_window_layers=36, **_TIED),
    "Qwen3-8B": _of(_QWEN3, "4096 12288 36 32 8", max_window_layers=36),
    "Qwen3-14B": _of(_QWEN3, "5120 17408 40 40 8", max_window_layers=40),
    "Qwen3-32B": _of(_QWEN3, "5120 25600 64 64 8", max_window_layers=64),
    "Qwen3-8B-Base": _of(_QWEN3, "4096 12288 36 32 8", max_window_layers=36, max_position_embeddings=32768),
    "Qwen3-4B-Instruct-2507": _of(
        _QWEN3, "2560 9728 36 32 8", max_window_layers=36, max_position_embeddings=262144, rope_theta=5000000, **_TIED
    ),
    "Qwen3-4B-Thinking-2507": _of(
        _QWEN3, "2560 9728 36 32 8", max_window_layers=36, max_position_embeddings=262144, rope_theta=5000000, **_TIED
    ),
    "Qwen3-Embedding-0.6B": _of(
        _QWEN3, "1024 3072 28 16 8", max_window_layers=28, vocab_size=151669, max_position_embeddings=32768, **_TIED
    ),
    "Qwen3-Reranker-0.6B": _of(_QWEN3, "1024 3072 28 16 8", max_window_layers=28, vocab_size=151669, **_TIED),
}  # fmt: skip

_GPTQ = {"bits": 4, "group_size": 128, "quant_method": "gptq", "desc_act": True, "sym": True}
_AWQ = {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True}
REFUSED: dict[str, tuple[Fields, str]] = {  # what is said
    "Llama-2-7B-GPTQ": (CONFIGS["Llama-2-7b-hf"] | {"quantization_config": _GPTQ}, "gptq"),
    "Qwen2.5-7B-Instruct-AWQ": (CONFIGS["Qwen2.5-7B"] | {"quantization_config": _AWQ}, "awq"),
    "Qwen3-32B-AWQ": (CONFIGS["Qwen3-32B"] | {"quantization_config": _AWQ}, "awq"),
    "DeepSeek-R1-0528-Qwen3-8B": (
        CONFIGS["Qwen3-8B"] | {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                "attn_factor": 0.8782488562869419,
            },
        },
        "attn_factor",
    ),
    "e5-mistral-7b-instruct": (CONFIGS["Mistral-7B-v0.1"] | {"architectures": ["MistralModel"]}, "MistralModel"),
    "Qwen2.5-Math-RM-72B": (
        CONFIGS["Qwen2.5-72B-Instruct"] | {"architectures": ["Qwen2ForRewardModel"]}, "Qwen2ForRewardModel",
    ),
    "gte-Qwen2-7B-instruct": (CONFIGS["Qwen2-7B"] | {"is_causal": False}, "is_causal"),
}  # fmt: skip
