"""Definitions of flags that several sections share."""

import json
from typing import Any

from megalora.choices import BASE_FORMATS, DTYPES, KV_CACHES, RECOMPUTE
from megalora.errors import UserError
from megalora.files import unique_fields
from megalora.flags.flag import Definition
from megalora.pipeline.partition import METHODS
from megalora.pipeline.schedule import SCHEDULES

BASE_FORMAT = Definition(
    "how the base model's linear weights are held in memory: in the compute dtype (dense), in 8 bits (fp8), in 4 bits "
    "(nf4), or in 4 bits and multiplied in 8 (nf4_fp8: trains faster than nf4, less exact); auto is as the files have "
    "them",
    choices=("auto", *BASE_FORMATS),
)
DTYPE = Definition(
    "compute dtype; auto: bfloat16 on GPUs and on CPUs that multiply it faster (AMX, AMD's AVX512-BF16), else float32",
    choices=("auto", *DTYPES),
)
KV_CACHE = Definition(
    "how keys and values of earlier tokens are kept: in the compute dtype (dense), or in 8 bits (fp8): about half the "
    "memory of 16 bits, rounded, and slower on GPUs",
    choices=KV_CACHES,
)
LORA_CONFIG = Definition("lora_config.json of a new adapter, or its contents", training_only=True)
TEMPLATE = Definition("chat template: a built-in name or a jinja file")
CHAT_TEMPLATE_KWARGS = Definition("""variables of the chat template, as a JSON object: '{"enable_thinking": false}'""")
SPECIAL_TOKENS_IN_TEXT = Definition("read special tokens that messages contain as special tokens, not as text")

TENSOR_PARALLEL_SIZE = Definition("processes that share each layer", at_least=1)
PIPELINE_PARALLEL_SIZE = Definition("pipeline stages that the layers are divided into", at_least=1)
CONTEXT_PARALLEL_SIZE = Definition(
    "processes that share the tokens of each document (context parallelism)", at_least=1, training_only=True
)
NPROC = Definition("start this many processes on this host, one per GPU, instead of torchrun", at_least=1)
PARTITION_METHOD = Definition(
    "how layers are assigned to stages; cost balances estimated time, parameters balances size", choices=METHODS
)
CUSTOM_PARTITION = Definition("number of layers of each stage, first to last, for partition_method custom", at_least=1)
UNEVEN_HEADS = Definition("allow a tensor_parallel_size that does not divide the attention heads; it works, but slower")
SEQUENCE_PARALLEL = Definition(
    "shard the activations between layers along the sequence, over the tensor-parallel ranks", training_only=True
)
SCHEDULE = Definition(
    "pipeline schedule: the order in which stages process microbatches", choices=tuple(SCHEDULES), training_only=True
)
VIRTUAL_PIPELINE_SIZE = Definition(
    "chunks of layers on each stage, for schedule interleaved_1f1b", at_least=1, training_only=True
)
RECOMPUTE_FLAG = Definition(
    "activations to recompute in the backward pass: as few as memory needs (auto), none, attention only (selective), "
    "or whole layers (full)",
    choices=RECOMPUTE,
    training_only=True,
)
MEMORY = Definition("memory of each GPU to plan with, in GiB", above=0, training_only=True)
PROFILE_FILE = Definition(
    "trace.json of a run with profile: use its measured times instead of estimates", training_only=True
)

SEQ_LENGTH = Definition("tokens in one row of a microbatch", at_least=2)
SOURCE_LENGTH = Definition("of an encoder-decoder: tokens in one row of sources; seq_length is of targets", at_least=2)
SOURCE_PREFIX = Definition("""of an encoder-decoder: text before every source, as T5's "summarize: \"""")
PER_DEVICE_TRAIN_BATCH_SIZE = Definition("rows in one microbatch of one data-parallel rank", at_least=1)
GLOBAL_BATCH_SIZE = Definition("rows in one step over all processes", at_least=1)
GRADIENT_ACCUMULATION_STEPS = Definition("microbatches in one step of one data-parallel rank", at_least=1)

NEW_SPECIAL_TOKENS = Definition(
    "tokens to add to tokenizer and model: their rows are trained, and rows of the data may write them", verbatim=True
)


def check_new_tokens(tokens: tuple[str, ...] | None) -> None:
    """Raise UserError for new_special_tokens that are blank, or named twice."""
    for token in tokens or ():
        if not token.strip() or token != token.strip():
            raise UserError(f"new_special_tokens {token!r} begins or ends with a blank", "leave the blank out")
    if len(set(tokens or ())) != len(tokens or ()):
        raise UserError("new_special_tokens names a token twice", "keep one")


def template_variables(text: str | None) -> dict[str, Any]:
    """Return the value of chat_template_kwargs: variables of the chat template. Raises UserError."""
    remedy = 'write {"name": value}'
    try:
        found = json.loads(text, object_pairs_hook=unique_fields) if text is not None else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"chat_template_kwargs {text!r} is not JSON ({error})", remedy) from None
    if not isinstance(found, dict):
        raise UserError(f"chat_template_kwargs {text!r} is not a JSON object", remedy)
    return found
