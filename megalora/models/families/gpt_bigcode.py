"""StarCoder, SantaCoder: GPT-2 with one key/value head for all query heads, or as many."""

from megalora.models.families.gpt2 import GPT2_FIELDS, GPT2_FILES, GPT2_HARMLESS, gpt2_like
from megalora.models.family import Family, Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    return gpt2_like(hf, 1 if hf.multi_query else hf.num_attention_heads, False)


FAMILY = Family(
    ("gpt_bigcode",),
    read,
    reads=GPT2_FIELDS | {"multi_query"},
    harmless=GPT2_HARMLESS
    | frozenset(
        "num_key_value_heads inference_runner pad_key_length pre_allocate_kv_cache validate_runner_input".split()
    ),
    files=GPT2_FILES,
    rotates=False,
    published=("starcoder", "santacoder"),
)
