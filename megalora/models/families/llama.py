"""Llama 2 and 3, DeepSeek-R1-Distill-Llama, SmolLM2: gated MLP, RMSNorm, grouped queries, biases only if asked for."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, LLAMA_FIXED, gated_mlp, grouped_attention, llama_like
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    attention = grouped_attention(hf, bias=hf.attention_bias, out_bias=hf.attention_bias)
    return llama_like(hf, lambda layer: attention, gated_mlp(hf, hf.mlp_bias))


FAMILY = Family(
    ("llama",),
    read,
    reads=LLAMA_FIELDS | {"attention_bias", "mlp_bias"},
    fixed=LLAMA_FIXED,
    files=LLAMA_FILES,
    published=(
        "Llama-2-7b-hf", "Llama-2-13b-hf", "Llama-2-70b-hf", "Llama-2-7b-chat-hf", "CodeLlama-7b-hf",
        "CodeLlama-13b-hf", "CodeLlama-34b-hf", "CodeLlama-70b-hf", "Meta-Llama-3-8B", "Meta-Llama-3-70B",
        "Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.1-405B", "Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.3-70B-Instruct",
        "Llama-Guard-3-8B", "Llama-3.1-Nemotron-70B-Instruct-HF", "Llama-3.1-Tulu-3-8B",
        "Llama-3.1-Minitron-4B-Width-Base", "Hermes-3-Llama-3.1-8B", "DeepSeek-R1-Distill-Llama-8B",
        "DeepSeek-R1-Distill-Llama-70B", "TinyLlama-1.1B-Chat-v1.0", "Sheared-LLaMA-1.3B", "Sheared-LLaMA-2.7B",
        "vicuna-7b-v1.5", "vicuna-7b-v1.5-16k", "open_llama_3b", "open_llama_7b", "open_llama_13b", "Amber",
        "SOLAR-10.7B-v1.0", "SmolLM-135M", "SmolLM-360M", "SmolLM-1.7B", "SmolLM2-135M", "SmolLM2-360M", "SmolLM2-1.7B",
        "deepseek-llm-7b-base", "deepseek-llm-67b-base", "deepseek-math-7b-instruct", "deepseek-coder-1.3b-base",
        "deepseek-coder-6.7b-base", "deepseek-coder-33b-base", "Yi-6B", "Yi-9B", "Yi-34B", "Yi-34B-200K",
        "Yi-1.5-9B-Chat", "Yi-Coder-9B", "Falcon3-1B-Base", "Falcon3-7B-Base", "Falcon3-10B-Base",
        "granite-3b-code-base-2k", "granite-8b-code-base-4k", "OpenCoder-8B-Base", "EuroLLM-1.7B", "salamandra-7b",
    ),
    refused={
        "Llama-2-7B-GPTQ": "its weights are quantised by a method that is not read",
    },
)  # fmt: skip
