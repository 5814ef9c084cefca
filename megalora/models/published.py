"""Published models whose config.json is tested: a tiny copy with the same fields has transformers' logits.

The fields are those of tests/dense_configs.py, written from memory; tests/models/test_dense_configs.py holds both lists
together. BUILT: those of tests/classic_configs.py and tests/published_configs.py. NAMED: those of
tests/models/test_encoder_configs.py. EXPERTS: those of tests/expert_configs.py.
"""

from __future__ import annotations

from collections.abc import Mapping

PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "llama": (
        "Llama-2-7b-hf", "Llama-2-13b-hf", "Llama-2-70b-hf", "Llama-2-7b-chat-hf", "CodeLlama-7b-hf",
        "CodeLlama-13b-hf", "CodeLlama-34b-hf", "CodeLlama-70b-hf", "Meta-Llama-3-8B", "Meta-Llama-3-70B",
        "Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.1-405B", "Llama-3.2-1B", "Llama-3.2-3B",
        "Llama-3.3-70B-Instruct", "Llama-Guard-3-8B", "Llama-3.1-Nemotron-70B-Instruct-HF",
        "Llama-3.1-Tulu-3-8B", "Llama-3.1-Minitron-4B-Width-Base", "Hermes-3-Llama-3.1-8B",
        "DeepSeek-R1-Distill-Llama-8B", "DeepSeek-R1-Distill-Llama-70B", "TinyLlama-1.1B-Chat-v1.0",
        "Sheared-LLaMA-1.3B", "Sheared-LLaMA-2.7B", "vicuna-7b-v1.5", "vicuna-7b-v1.5-16k", "open_llama_3b",
        "open_llama_7b", "open_llama_13b", "Amber", "SOLAR-10.7B-v1.0", "SmolLM-135M", "SmolLM-360M",
        "SmolLM-1.7B", "SmolLM2-135M", "SmolLM2-360M", "SmolLM2-1.7B", "deepseek-llm-7b-base",
        "deepseek-llm-67b-base", "deepseek-math-7b-instruct", "deepseek-coder-1.3b-base",
        "deepseek-coder-6.7b-base", "deepseek-coder-33b-base", "Yi-6B", "Yi-9B", "Yi-34B", "Yi-34B-200K",
        "Yi-1.5-9B-Chat", "Yi-Coder-9B", "Falcon3-1B-Base", "Falcon3-7B-Base", "Falcon3-10B-Base",
        "granite-3b-code-base-2k", "granite-8b-code-base-4k", "OpenCoder-8B-Base", "EuroLLM-1.7B",
        "salamandra-7b",
    ),
    "mistral": (
        "Mistral-7B-v0.1", "Mistral-7B-Instruct-v0.1", "Mistral-7B-Instruct-v0.2", "Mistral-7B-v0.3",
        "Mathstral-7B-v0.1", "Codestral-22B-v0.1", "Mistral-Small-Instruct-2409", "Mistral-Large-Instruct-2407",
        "Mistral-Large-Instruct-2411", "Mistral-Nemo-Base-2407", "Mistral-Nemo-Instruct-2407",
        "Mistral-NeMo-Minitron-8B-Base", "Mistral-Small-24B-Base-2501", "Devstral-Small-2505",
        "Magistral-Small-2506", "Ministral-8B-Instruct-2410", "zephyr-7b-beta", "OpenHermes-2.5-Mistral-7B",
        "openchat-3.5-1210", "Starling-LM-7B-alpha",
    ),
    "qwen2": (
        "Qwen1.5-0.5B", "Qwen1.5-1.8B", "Qwen1.5-4B", "Qwen1.5-7B", "Qwen1.5-14B", "Qwen1.5-32B", "Qwen1.5-72B",
        "Qwen1.5-110B", "CodeQwen1.5-7B", "Qwen2-0.5B", "Qwen2-1.5B", "Qwen2-7B", "Qwen2-72B", "Qwen2.5-0.5B",
        "Qwen2.5-1.5B-Instruct", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B-Instruct",
        "Qwen2.5-72B-Instruct", "Qwen2.5-7B-Instruct with YaRN", "Qwen2.5-7B-Instruct-1M", "Qwen2.5-Coder-7B",
        "Qwen2.5-Coder-32B-Instruct", "Qwen2.5-Math-1.5B", "Qwen2.5-Math-7B", "QwQ-32B",
        "DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-7B",
    ),
    "qwen3": (
        "Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Qwen3-8B-Base",
        "Qwen3-4B-Instruct-2507", "Qwen3-4B-Thinking-2507", "Qwen3-Embedding-0.6B", "Qwen3-Reranker-0.6B",
    ),
}  # fmt: skip
"""Names of models, as their publishers call them, by model_type."""

REFUSED: Mapping[str, str] = {
    "Llama-2-7B-GPTQ": "its weights are quantised by a method that is not read",
    "Qwen2.5-7B-Instruct-AWQ": "its weights are quantised by a method that is not read",
    "Qwen3-32B-AWQ": "its weights are quantised by a method that is not read",
    "DeepSeek-R1-0528-Qwen3-8B": "`attn_factor` is no field that transformers reads: the message says what to write",
    "e5-mistral-7b-instruct": "its folder has no head that writes text",
    "Qwen2.5-Math-RM-72B": "its head gives rewards",
    "gte-Qwen2-7B-instruct": "its attention is not causal",
}
"""Published models of the same types that are refused, and why."""

BUILT: Mapping[str, tuple[str, ...]] = {
    "RefinedWeb": ("falcon-40b, first form",),
    "RefinedWebModel": ("falcon-7b, first form",),
    "apertus": ("Apertus-8B-Instruct-2509",),
    "bloom": ("bloom-560m", "bloom-1b7", "bloom-7b1", "bloom"),
    "btlm": ("btlm-3b-8k",),
    "chatglm": ("chatglm2-6b", "chatglm3-6b"),
    "codegen": ("codegen-350M", "codegen-2B", "codegen-6B"),
    "cohere": ("c4ai-command-r-v01",),
    "cohere2": ("c4ai-command-r7b-12-2024",),
    "cwm": ("cwm",),
    "ernie4_5": ("ERNIE-4.5-0.3B-PT",),
    "exaone4": ("EXAONE-4.0-1.2B",),
    "falcon": ("falcon-7b", "falcon-40b", "falcon-rw-1b", "falcon-11b"),
    "gemma": ("gemma-2b", "gemma-7b"),
    "gemma2": ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b"),
    "gemma3": ("gemma-3-4b-it",),
    "gemma3_text": ("gemma-3-1b-it",),
    "glm": ("glm-4-9b-hf",),
    "glm4": ("GLM-4-9B-0414", "GLM-4-32B-0414"),
    "gpt2": ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"),
    "gpt_bigcode": ("starcoder", "santacoder"),
    "gpt_neo": ("gpt-neo-125m", "gpt-neo-1.3B", "gpt-neo-2.7B"),
    "gpt_neox": ("pythia-1.4b", "pythia-6.9b", "gpt-neox-20b"),
    "gptj": ("gpt-j-6b",),
    "granite": ("granite-3.1-8b-base", "granite-3.1-2b-base"),
    "helium": ("helium-1-preview-2b",),
    "hunyuan_v1_dense": ("Hunyuan-MT-7B",),
    "hyperclovax": ("HyperCLOVAX-SEED-Think-14B",),
    "internlm2": ("internlm2-1_8b", "internlm2-7b", "internlm2_5-7b-chat", "internlm2-20b"),
    "internlm3": ("internlm3-8b-instruct",),
    "minicpm3": ("MiniCPM3-4B",),
    "ministral3": ("Ministral-3-8B-Base-2512, its text_config",),
    "mistral3": ("Mistral-Small-3.1-24B-Instruct-2503",),
    "mpt": ("mpt-7b", "mpt-7b-storywriter", "mpt-30b"),
    "nemotron": ("Minitron-4B-Base",),
    "olmo": ("OLMo-1B-hf", "OLMo-7B-hf"),
    "olmo2": ("OLMo-2-1124-7B", "OLMo-2-1124-13B"),
    "olmo3": ("Olmo-3-1025-7B",),
    "opt": ("opt-125m", "opt-350m", "opt-1.3b", "opt-6.7b", "opt-30b"),
    "phi": ("phi-1.5", "phi-2"),
    "phi3": ("Phi-3-mini-4k-instruct", "Phi-3.5-mini-instruct", "phi-4"),
    "seed_oss": ("Seed-OSS-36B-Instruct",),
    "qwen2_5_vl": ("Qwen2.5-VL-7B-Instruct",),
    "smollm3": ("SmolLM3-3B",),
    "stablelm": ("stablelm-2-1_6b", "stablelm-2-12b"),
    "starcoder2": ("starcoder2-3b", "starcoder2-7b", "starcoder2-15b"),
}  # fmt: skip
"""Published models whose config.json is read and cut into tensor 2 x pipeline 4, with the parameters that they have
(gpt2-xl and falcon-7b have an odd number of heads: with uneven_heads)."""

NAMED: Mapping[str, tuple[str, ...]] = {
    "camembert": ("camembert-base",),
    "distilbert": ("distilbert-base-uncased", "distilbert-base-multilingual-cased"),
    "ernie": ("ernie-3.0-base-zh",),
    "m2m_100": ("nllb-200-distilled-600M",),
    "mbart": ("mbart-large-50-many-to-many-mmt",),
    "modernbert": ("ModernBERT-base", "ModernBERT-large"),
    "mpnet": ("mpnet-base", "all-mpnet-base-v2"),
    "pegasus": ("pegasus-xsum",),
    "umt5": ("umt5-small",),
    "xlm-roberta-xl": ("xlm-roberta-xl",),
}
"""Published encoders and encoder-decoders whose config.json is read: parameters have transformers' names and shapes."""

EXPERTS: Mapping[str, tuple[str, ...]] = {
    "dots1": ("dots.llm1.inst",),
    "ernie4_5_moe": ("ERNIE-4.5-21B-A3B-PT",),
    "glm4_moe_lite": ("GLM-4.7-Flash",),
    "granitemoe": ("granite-3.1-1b-a400m-base", "granite-3.1-3b-a800m-base"),
    "kimi_k2": ("Kimi-K2-Instruct",),
    "minimax_m2": ("MiniMax-M2",),
    "mixtral": ("Mixtral-8x7B-v0.1",),
    "olmoe": ("OLMoE-1B-7B-0924",),
    "qwen3_moe": ("Qwen3-30B-A3B",),
    "solar_open": ("Solar-Open-100B",),
}
"""Published models of experts whose config.json is read, with as many parameters as transformers' model of it has."""
