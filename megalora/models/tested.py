"""What is tested with each model type. tests/models/test_supported.py compares it with the tables of the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Types = frozenset[str]

CELLS: Mapping[str, str] = {
    "yes": "a test of the suite runs it with this model type",
    "proof": "only `make proof` runs it with this model type",
    "cache": "a cache gives the same numbers token by token; replies are not compared with transformers'",
    "shared": "no test runs it with this model type: the code is shared with those that are tested",
    "untested": "needs a GPU, and no run that passed on one is on record with this model type",
    "labels": "a classifier: writes labels, not text",
}
"""The cells of the table of supported models, and what they say."""


@dataclass(frozen=True)
class Feature:
    """A feature that reads the spec, so that every family has it, and what is tested of it.

    tests   files of the tests
    covers  what it covers, and its limits
    except_for  cell -> first model types of the families for which it is not "yes"
    around  models around a language model of another family, used on text only, for which it is tested itself
    """

    name: str
    tests: tuple[str, ...]
    covers: str
    except_for: Mapping[str, Types] = field(default_factory=dict)
    needs_gpu: bool = False
    around: Types = frozenset()


def _types(names: str) -> Types:
    return frozenset(names.split())


_LAYOUTS: tuple[str, ...] = (
    *("tests/test_layouts.py", "tests/test_modern.py", "tests/test_classic.py", "tests/test_experts.py"),
    *("tests/tasks/test_classes.py", "tests/tasks/test_seq2seq.py", "tests/tasks/test_images.py"),
)
_PARITY = (
    *("tests/test_field_parity.py", "tests/test_modern.py", "tests/test_classic.py", "tests/tasks/test_classes.py"),
    *("tests/tasks/test_seq2seq.py", "tests/tasks/test_images.py"),
)
_REMOTE = "tests/models/test_remote_families.py"
_FIRST_NAMES = "RefinedWeb RefinedWebModel"  # of Falcon: the tests run its layers under the name falcon
_EXPERTS_ON_GPU = "deepseek_v2 deepseek_v3 glm4_moe gpt_oss mixtral qwen2_moe qwen3_moe"
_EXPERTS = (
    f"{_EXPERTS_ON_GPU} dots1 ernie4_5_moe glm4_moe_lite granitemoe kimi_k2 llama4_text minimax_m2 olmoe solar_open"
)
_STACKED = _types("gpt_oss granitemoe llama4_text")  # whose files hold the experts of a layer in one tensor
_TODAY = (
    "apertus arcee cohere cohere2 cwm ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 granite helium "
    "hunyuan_v1_dense hyperclovax internlm3 minicpm3 ministral3 nemotron olmo olmo2 olmo3 seed_oss smollm3 stablelm "
    "starcoder2"
)
_ENCODERS = "bert deberta deberta-v2 distilbert electra ernie layoutlm modernbert mpnet roberta xlm-roberta-xl"
_SEQ2SEQ = "bart m2m_100 mbart pegasus t5 umt5"
_AROUND = _types("gemma3 llama4 mistral3 qwen2_5_vl qwen2_vl qwen3_vl")
_ON_GPU = _types(f"{_EXPERTS_ON_GPU} deberta deberta-v2 gemma2 granite starcoder2")

FEATURES = (
    Feature(
        "parity",
        (*_PARITY, "tests/test_experts.py", _REMOTE),
        "losses and gradients of adapters are those of transformers and peft (experts: of the merged model in "
        "transformers; `btlm`, `chatglm`, `internlm2`: of their published code written in plain torch)",
        {"shared": _types(_FIRST_NAMES)},
    ),
    Feature(
        "packing",
        (*_PARITY, _REMOTE),
        "documents of a row never see one another: the same losses and gradients as one by one",
        {"shared": _types(f"{_FIRST_NAMES} {_EXPERTS}")},
    ),
    Feature(
        "TP",
        _LAYOUTS,
        "tensor parallelism; must divide the attention heads or `--uneven_heads true`",
        {"proof": _types(f"{_FIRST_NAMES} internlm3 ministral3 olmo2")},
    ),
    Feature(
        "SP",
        _LAYOUTS,
        "sequence parallelism, with tensor parallelism",
        {
            "proof": _types(
                f"{_FIRST_NAMES} apertus btlm cohere2 cwm ernie ernie4_5 exaone4 glm gptj internlm3 minicpm3 "
                "ministral3 olmo2 roberta starcoder2"
            )
        },
    ),
    Feature(
        "PP",
        _LAYOUTS,
        "pipeline parallelism, at least one layer a stage; every schedule is tested with `llama`",
        {
            "proof": _types(
                f"{_FIRST_NAMES} apertus chatglm cohere ernie4_5 glm glm4 gpt_neo helium hunyuan_v1_dense "
                "hyperclovax mpt seed_oss smollm3"
            )
        },
    ),
    Feature(
        "DP",
        _LAYOUTS,
        "data parallelism",
        {
            "proof": (_types(_TODAY) - _types("cohere gemma2 glm4 helium hyperclovax smollm3"))
            | _types(f"{_FIRST_NAMES} bloom btlm codegen electra gpt2 gpt_bigcode gptj internlm2 layoutlm mpnet phi")
            | _types("roberta xlm-roberta-xl"),
        },
    ),
    Feature(
        "recompute",
        _LAYOUTS,
        "selective (attention) or full",
        {
            "proof": _types(f"{_FIRST_NAMES} apertus chatglm ernie ernie4_5 glm gpt_neo hunyuan_v1_dense mpt")
            | _types("roberta seed_oss")
        },
    ),
    Feature(
        "CUDA graphs",
        ("tests/test_gpu_step.py",),
        "in bfloat16 and float16, with heads of a multiple of 8 up to 256 features; without pipeline stages, "
        "encoder-decoders, chunked attention and images",
        {
            "untested": _types(
                f"{_FIRST_NAMES} {_EXPERTS} {_TODAY} {_ENCODERS} {_SEQ2SEQ} blip-2 "
                "bloom btlm chatglm codegen falcon gpt2 gpt_bigcode gpt_neo gptj internlm2 mpt opt phi"
            )
            - _ON_GPU
        },
        needs_gpu=True,
    ),
    Feature(
        "generate",
        (
            *("tests/test_generation_parity.py", "tests/test_modern.py", "tests/test_classic_files.py"),
            *("tests/test_classic.py", "tests/test_experts.py", "tests/test_seq2seq.py", "tests/test_images.py"),
            "tests/test_multimodal.py",
        ),
        "greedy replies are transformers', token for token",
        {
            "cache": _types(f"{_FIRST_NAMES} btlm chatglm codegen gpt_bigcode gpt_neo internlm2 mpt opt phi"),
            "labels": _types(_ENCODERS),
        },
        around=_AROUND - _types("llama4"),
    ),
    Feature(
        "plan",
        ("tests/planning/test_nodes.py",),
        "what a microbatch keeps, counted to the byte",
        {
            "shared": _types(f"{_FIRST_NAMES} {_EXPERTS} {_ENCODERS} {_SEQ2SEQ}")
            | _types("blip-2 btlm chatglm codegen gemma3_text gpt_bigcode gpt_neo internlm2 mistral phi")
        },
    ),
    Feature(
        "convert",
        (
            *("tests/test_convert.py", "tests/test_classic_files.py", "tests/test_fused_experts.py"),
            *("tests/test_images.py", "tests/test_multimodal.py"),
        ),
        "safetensors to shards and back, every bit kept",
        {
            "shared": _types(f"{_FIRST_NAMES} {_EXPERTS} {_TODAY} {_ENCODERS} {_SEQ2SEQ}") - _STACKED
            | _types("bloom btlm chatglm codegen gpt_bigcode gpt_neo gptj internlm2 mpt opt phi")
        },
        around=_AROUND,
    ),
    Feature(
        "PEFT files",
        (
            *("tests/test_convert_adapter.py", "tests/test_classic_files.py", "tests/test_fused_experts.py"),
            *("tests/test_images.py", "tests/test_multimodal.py"),
        ),
        "adapters that peft wrote are read, with the same logits; written: the first six of tests/oracle.py, `gpt2`, "
        "`falcon`, `gpt_oss`, `granitemoe`, `llama4_text`, `blip-2`, `gemma3` and `qwen2_5_vl`; merged into the base: "
        "`llama`, `gpt2`, `falcon`, `gpt_oss`, `granitemoe`, `llama4_text`, `mixtral`, `qwen3_moe`, `blip-2` and the "
        "models around another",
        {
            "shared": _types(f"{_FIRST_NAMES} {_EXPERTS} {_TODAY} {_ENCODERS} {_SEQ2SEQ} btlm chatglm")
            - (_STACKED | _types("mixtral qwen3_moe"))
            | _types("gpt_neo internlm2")
        },
        around=_AROUND,
    ),
)


def cell(feature: Feature, kind: str) -> str:
    """Return the table's cell of a family whose first model type is `kind`."""
    if kind in _AROUND - feature.around:
        return "untested" if feature.needs_gpu else "shared"
    for said, kinds in feature.except_for.items():
        if kind in kinds:
            return said
    return "yes"
