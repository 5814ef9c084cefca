"""Sections of `megalora plan`, `megalora data`, `megalora doctor` and `megalora convert`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalora.choices import DTYPES
from megalora.errors import UserError
from megalora.flags import shared
from megalora.flags.flag import REQUIRED, Section, flag
from megalora.flags.layout import LayoutArguments
from megalora.planning.devices import DEVICES


@dataclass(frozen=True)
class PlanArguments(Section):
    """The GPUs, the run, and the parts of its layout that are fixed; the rest is searched.

    Rows of a step: global_batch_size, or per_device_train_batch_size * gradient_accumulation_steps of each
    data-parallel rank, whichever is given.
    """

    model_path: str = flag(
        REQUIRED,
        "Hugging Face folder of the model, or its config.json alone",
        exists="a Hugging Face folder, or a config.json",
    )
    gpus: int = flag(REQUIRED, "number of GPUs", at_least=1)
    lora_config: str | None = shared.LORA_CONFIG.field(None, unset="chosen by model_type")
    device: str = flag("h100", "type of the GPUs, for their speed; or cpu", choices=tuple(DEVICES))
    memory: float | None = shared.MEMORY.field(None, unset="that of device")
    reserve: float = flag(
        4.0, "GiB of memory to leave free for CUDA context, NCCL buffers and fragmentation", at_least=0
    )
    gpus_per_node: int = flag(8, "GPUs per node (connected by NVLink)", at_least=1)
    host_memory: float = flag(
        0.0, "GiB of host memory for each GPU in which recompute auto may keep activations", at_least=0
    )
    seq_length: int = shared.SEQ_LENGTH.field(1024)
    longest: bool = flag(False, "find the longest row that each layout can train, instead of layouts for seq_length")
    source_length: int | None = shared.SOURCE_LENGTH.field(None, unset="seq_length")
    global_batch_size: int | None = shared.GLOBAL_BATCH_SIZE.field(
        None,
        unset="128 rounded up to a multiple of gpus, or set by gradient_accumulation_steps",
    )
    per_device_train_batch_size: int | None = shared.PER_DEVICE_TRAIN_BATCH_SIZE.field(
        None, unset="searched, or 1 with gradient_accumulation_steps"
    )
    gradient_accumulation_steps: int | None = shared.GRADIENT_ACCUMULATION_STEPS.field(
        None, unset="set by global_batch_size"
    )
    tensor_parallel_size: int | None = shared.TENSOR_PARALLEL_SIZE.field(None, unset="searched")
    pipeline_parallel_size: int | None = shared.PIPELINE_PARALLEL_SIZE.field(None, unset="searched")
    context_parallel_size: int | None = shared.CONTEXT_PARALLEL_SIZE.field(
        None, unset="1, or searched where nothing fits and for longest"
    )
    sequence_parallel: bool | None = shared.SEQUENCE_PARALLEL.field(None, unset="true with tensor parallelism")
    partition_method: str = shared.PARTITION_METHOD.field("cost")
    custom_partition: tuple[int, ...] | None = shared.CUSTOM_PARTITION.field(None, unset="none")
    uneven_heads: bool = shared.UNEVEN_HEADS.field(False)
    schedule: str | None = shared.SCHEDULE.field(None, unset="searched")
    virtual_pipeline_size: int | None = shared.VIRTUAL_PIPELINE_SIZE.field(None, unset="searched")
    recompute: str | None = shared.RECOMPUTE_FLAG.field(None, unset="searched")
    base_format: str = shared.BASE_FORMAT.field("auto")
    new_special_tokens: tuple[str, ...] | None = shared.NEW_SPECIAL_TOKENS.field(None, unset="none")
    dtype: str = flag("bfloat16", "compute dtype", choices=tuple(name for name in DTYPES if name != "float64"))
    profile_file: str | None = shared.PROFILE_FILE.field(None, unset="estimated times of device")
    draw: str | None = flag(None, "SVG file to draw one step of the best layout to", unset="no drawing")

    def __post_init__(self) -> None:
        super().__post_init__()
        shared.check_new_tokens(self.new_special_tokens)
        if (self.partition_method == "custom") != (self.custom_partition is not None):
            raise UserError("partition_method custom and custom_partition go together", "give both or neither")
        if self.longest:
            self._check_longest()
        if self.custom_partition is not None and self.pipeline_parallel_size is None:
            raise UserError(
                "custom_partition gives the layers of each stage, but pipeline_parallel_size is not given",
                "give pipeline_parallel_size too",
            )


    def _check_longest(self) -> None:
        given = {
            "seq_length": self.seq_length != PlanArguments.seq_length,
            "global_batch_size": self.global_batch_size is not None,
            "per_device_train_batch_size": self.per_device_train_batch_size is not None,
        }
        for name in [name for name, changed in given.items() if changed]:
            raise UserError(
                f"{name} has no effect with longest, which looks for the length of the one row of a microbatch",
                f"leave out {name} or longest",
            )


@dataclass(frozen=True)
class PreviewArguments(Section):
    """Which rows to show as the run would see them; all rows are counted."""

    model_path: str = flag(
        REQUIRED,
        "Hugging Face folder of the model, for its tokenizer and chat template",
        exists="a Hugging Face folder with a tokenizer",
    )
    rows: int = flag(3, "number of rows to show, from the first", at_least=0)
    row: int | None = flag(
        None, "show only this row, by its number over all files, from 0", at_least=0, unset="the first rows"
    )


@dataclass(frozen=True)
class DoctorArguments(Section):
    """What a run needs of its hosts. Under torchrun, the links between the ranks are measured too."""

    output_dir: str = flag(".", "folder that the run would write to: checked for free space, and shared by all hosts")
    free_space: float = flag(2.0, "GiB that must be free in output_dir", at_least=0)
    tensor_parallel_size: int = shared.TENSOR_PARALLEL_SIZE.field(1)
    pipeline_parallel_size: int = shared.PIPELINE_PARALLEL_SIZE.field(1)


@dataclass(frozen=True)
class ConvertArguments(Section):
    """What to read and write. All is checked before anything is written, and the output appears once it is complete."""

    input: str = flag(
        REQUIRED,
        "what to convert: a model folder, a run or folder of an adapter, or (from-gguf) a .gguf file",
        exists="the folder or file to convert",
    )
    output: str = flag(REQUIRED, "folder to write; must not be the input")
    overwrite: bool = flag(False, "replace a model or adapter in output, once the new one is complete")
    dry_run: bool = flag(False, "check everything and say what would be written, without writing it")


@dataclass(frozen=True)
class BaseArguments(Section):
    """The base model of the adapter."""

    base: str | None = flag(
        None,
        "folder of the model that the adapter was trained on: a Hugging Face folder or megalora shards",
        unset="the folder that the adapter names",
    )


@dataclass(frozen=True)
class SafetensorsArguments(Section):
    """How a Hugging Face folder is written."""

    max_shard_size: float = flag(5.0, "maximum size of one safetensors file, in GB (10^9 bytes)", above=0)


@dataclass(frozen=True)
class CombineArguments(Section):
    """The adapters beside the input, and how their sum becomes one."""

    others: tuple[str, ...] = flag(REQUIRED, "the other adapters: runs, shards or PEFT folders", verbatim=True)
    weights: tuple[float, ...] | None = flag(None, "weight of each adapter, the input first", unset="1 each")
    method: str = flag(
        "cat",
        "cat: exact, the ranks add up; svd: the nearest adapter of svd_rank; linear: peft's, sums of A and of B",
        choices=("cat", "svd", "linear"),
    )
    svd_rank: int | None = flag(None, "rank of the result of svd", at_least=1, unset="that of the input")


@dataclass(frozen=True)
class ExtractArguments(Section):
    """The adapter that is made of the difference between the input, a tuned model, and its base."""

    rank: int = flag(16, "rank of the adapter of each linear", at_least=1)


@dataclass(frozen=True)
class CompareArguments(Section):
    """Two adapters of one model."""

    adapter: str = flag(REQUIRED, "an adapter: run, checkpoint, shards or PEFT folder", exists="an adapter")
    other: str = flag(REQUIRED, "the adapter to compare it with", exists="an adapter")


@dataclass(frozen=True)
class InitArguments(Section):
    """How a start that changes the base is made: init_lora_weights of lora_config is pissa or olora."""

    lora_config: str = shared.LORA_CONFIG.field(REQUIRED)


@dataclass(frozen=True)
class PlainArguments(Section):
    """What the adapter began as."""

    initial: str = flag(REQUIRED, "the initial adapter, as convert adapter init wrote it", exists="an adapter")


CONVERT_COMMANDS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "to-shards": (
        "base weights, Hugging Face folder to shards: mp_rank_XX_pp_rank_YYY/partial_model_optim.pt",
        (ConvertArguments, LayoutArguments),
    ),
    "to-hf": ("base weights, shards to Hugging Face folder", (ConvertArguments, SafetensorsArguments)),
    "reshard": ("base weights, shards to shards of another layout", (ConvertArguments, LayoutArguments)),
    "dequantise": (
        "quantised base weights (bitsandbytes 4-bit, fp8) to Hugging Face folder in 16 bits",
        (ConvertArguments, SafetensorsArguments),
    ),
    "from-gguf": (
        "GGUF file to Hugging Face folder in float32; needs memory for the whole model",
        (ConvertArguments,),
    ),
    "adapter to-peft": (
        "adapter (run, checkpoint or shards) to PEFT folder; --base is the model name to record in it",
        (ConvertArguments, BaseArguments),
    ),
    "adapter from-peft": (
        "adapter, PEFT folder to shards: mp_rank_XX_pp_rank_YYY/lora_partial_model_optim.pt",
        (ConvertArguments, BaseArguments, LayoutArguments),
    ),
    "adapter merge": (
        "adapter (any of these) merged into a copy of its base, as Hugging Face folder; summed in float32",
        (ConvertArguments, BaseArguments, SafetensorsArguments),
    ),
    "adapter combine": (
        "several adapters of one model summed into one, as PEFT folder",
        (ConvertArguments, CombineArguments),
    ),
    "adapter extract": (
        "adapter from the difference of two models (singular values), as PEFT folder; reports what it leaves out",
        (ConvertArguments, BaseArguments, ExtractArguments),
    ),
    "adapter compare": ("two adapters compared: how far apart what they add to each linear is", (CompareArguments,)),
    "adapter init": (
        "PiSSA or OLoRA start: the changed base in output, and its adapter in output/initial",
        (ConvertArguments, InitArguments, SafetensorsArguments),
    ),
    "adapter to-lora": (
        "adapter trained from adapter init, as plain LoRA of the unchanged base (twice the rank)",
        (ConvertArguments, BaseArguments, PlainArguments),
    ),
}
"""The commands of `megalora convert`: what each does, and the sections of its flags."""
