"""What is tested with each model type. tests/models/test_supported.py compares it with the tables of the tests.

A family of a kind that is there has the cells of that kind, and needs no line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Types = frozenset[str]

DECODERS, EXPERTS, PAIRS, ENCODERS = "decoders", "mixtures of experts", "encoder-decoders", "encoders, as classifiers"
AROUND, IMAGES = "language models of image models, on text", "image models"
CELLS: Mapping[str, str] = {
    "yes": "a test of the suite runs it with this model type",
    "all": "the suite runs it with this model type in each way there is",
    "cache": "a cache gives the same numbers token by token; replies are not compared with transformers'",
    "proof": "only `make proof` runs it with this model type",
    "shared": "no test runs it with this model type: the code is shared with those that are tested",
    "untested": "needs a GPU, and no run that passed on one is on record with this model type",
    "labels": "a classifier: writes labels, not text",
}
"""The cells of the table of supported models, and what they say."""


@dataclass(frozen=True)
class Feature:
    """A feature that reads the spec, so that every family has it, and what is tested of it.

    tests      files of the tests
    covers     what it covers, and its limits
    said       the cell of a family for which nothing else is said
    by_kind    of a kind of families (see `megalora.models.supported.kind_of`) -> its cell
    by_type    cell -> first model types of the families that have it, whatever their kind
    needs_gpu  its tests run on GPUs alone
    """

    name: str
    tests: tuple[str, ...]
    covers: str
    said: str = "yes"
    by_kind: Mapping[str, str] = field(default_factory=dict)
    by_type: Mapping[str, Types] = field(default_factory=dict)
    needs_gpu: bool = False


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
_FIRST_SIX = "llama mistral qwen2 qwen3 phi3 gpt_neox"  # which the tests of every feature run
# Whose files hold the experts of a layer in one tensor.
_STACKED = "gemma4_text gpt_oss granitemoe granitemoehybrid llama4_text qwen3_5_moe_text"

FEATURES = (
    Feature(
        "parity",
        (*_PARITY, "tests/test_experts.py", _REMOTE),
        "losses and gradients of adapters are those of transformers and peft (experts: of the merged model in "
        "transformers; `btlm`, `chatglm`, `internlm2`: of their published code written in plain torch)",
        by_kind={AROUND: "shared"},
        by_type={"shared": _types(_FIRST_NAMES)},
    ),
    Feature(
        "packing",
        (*_PARITY, _REMOTE),
        "documents of a row never see one another: the same losses and gradients as one by one",
        by_kind={AROUND: "shared", EXPERTS: "shared"},
        by_type={"shared": _types(_FIRST_NAMES), "yes": _types("granitemoehybrid")},
    ),
    Feature(
        "layouts",
        _LAYOUTS,
        "tensor parallelism (which must divide the attention heads, or `--uneven_heads true`) with and without "
        "sequence parallelism, pipeline parallelism (at least one layer a stage) and data parallelism, with selective "
        "or full recompute or without: the numbers of one process. `yes`: on one or two layouts of four processes "
        "(`make proof` runs more); `all`: on each mesh of up to eight",
        by_kind={AROUND: "shared"},
        by_type={"all": _types(_FIRST_SIX), "proof": _types(_FIRST_NAMES)},
    ),
    Feature(
        "CUDA graphs",
        ("tests/test_gpu_step.py",),
        "in bfloat16 and float16, with heads of a multiple of 8 up to 256 features; without pipeline stages, "
        "encoder-decoders, chunked attention, Mamba-2 and images; linear attention in bfloat16, where it has kernels",
        "untested",
        by_type={
            "yes": _types(
                f"{_FIRST_SIX} afmoe cohere2_moe deberta deberta-v2 deepseek_v2 deepseek_v3 dots1 ernie4_5_moe "
                "exaone_moe gemma2 glm4_moe glm4_moe_lite gpt_oss granite granitemoe granitemoe_swa granitemoeshared "
                "hunyuan_v1_moe hy_v3 kimi_k2 lfm2_moe minimax_m2 mistral4 mixtral olmoe qwen2_moe qwen3_5_moe_text "
                "qwen3_5_text qwen3_moe qwen3_next solar_open starcoder2"
            )
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
        by_kind={ENCODERS: "labels"},
        by_type={
            "cache": _types(f"{_FIRST_NAMES} btlm chatglm codegen gpt_bigcode gpt_neo internlm2 mpt opt phi"),
            "shared": _types("llama4"),
        },
    ),
    Feature(
        "plan",
        ("tests/planning/test_nodes.py",),
        "what a microbatch keeps, counted to the byte",
        by_kind=dict.fromkeys((EXPERTS, AROUND, ENCODERS, PAIRS, IMAGES), "shared"),
        by_type={
            "yes": _types("granitemoehybrid"),
            "shared": _types(
                f"{_FIRST_NAMES} btlm chatglm codegen gemma3_text gpt_bigcode gpt_neo internlm2 mistral phi"
            )
        },
    ),
    Feature(
        "convert",
        (
            *("tests/test_convert.py", "tests/test_classic_files.py", "tests/test_fused_experts.py"),
            *("tests/test_images.py", "tests/test_multimodal.py"),
        ),
        "safetensors to shards and back, every bit kept",
        "shared",
        by_kind={AROUND: "yes", IMAGES: "yes"},
        by_type={"yes": _types(f"{_FIRST_SIX} {_STACKED} gpt2 falcon")},
    ),
    Feature(
        "PEFT files",
        (
            *("tests/test_convert_adapter.py", "tests/test_classic_files.py", "tests/test_fused_experts.py"),
            *("tests/test_images.py", "tests/test_multimodal.py"),
        ),
        "adapters that peft wrote are read, with the same logits; written: the first six of tests/oracle.py, `gpt2`, "
        "`falcon`, `gemma4_text`, `gpt_oss`, `granitemoe`, `granitemoehybrid`, `llama4_text`, `qwen3_5_moe_text`, "
        "`blip-2`, `gemma3`, `qwen2_5_vl` and `qwen3_5`; merged into the base: `llama`, `gpt2`, `falcon`, "
        "`gemma4_text`, `gpt_oss`, `granitemoe`, `granitemoehybrid`, `llama4_text`, `qwen3_5_moe_text`, `mixtral`, "
        "`qwen3_moe`, `blip-2` and the models around another",
        "shared",
        by_kind={AROUND: "yes", IMAGES: "yes"},
        by_type={
            "yes": _types(
                f"{_FIRST_SIX} {_STACKED} mixtral qwen3_moe bloom codegen falcon gpt2 gpt_bigcode gptj mpt opt phi"
            )
        },
    ),
)


def cell(feature: Feature, model_type: str, kind: str) -> str:
    """Return the table's cell of a family of this kind whose first model type is `model_type`."""
    for said, types in feature.by_type.items():
        if model_type in types:
            return said
    return feature.by_kind.get(kind, feature.said)
