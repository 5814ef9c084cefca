"""Command line and YAML to frozen dataclasses.

The fields of the section dataclasses below are the one table of flags: the parser, the YAML reader, `--help`,
the value checks and the README's table (`flags_table`) all read it. A section is handed to the part that
needs it, never the whole. Everything a user can get wrong raises UserError; nothing here imports torch.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from megalora.errors import UserError
from megalora.pipeline.schedule import SCHEDULES

REQUIRED = MISSING
"""Default of a flag that must be given."""


def flag(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that is also a flag.

    `help` is one line, with the unit. `limits` are any of `choices` (tuple), `at_least`, `above`, `at_most`,
    `below` (numbers; `above` and `below` exclude the bound), `unset` (what a default of None comes to),
    `empty` (a text may be empty), `verbatim` (texts are taken as they are, commas and blanks too) and
    `training_only` (of a section that generation shares, but without effect there).
    """
    return field(default=default, metadata={"help": help, **limits})


class Section:
    """Base of the sections: a value from Python is held to the same limits as one from the command line."""

    def __post_init__(self) -> None:
        for entry in flags_of(type(self)):
            entry.check(getattr(self, entry.name), entry.name)


# --------------------------------------------------------------------------------------- the table of flags


@dataclass(frozen=True)
class ModelArguments(Section):
    """Which model, from which weights, in which precision."""

    model_path: str = flag(REQUIRED, "Hugging Face folder of the model: config.json, tokenizer, weights")
    resume_from_checkpoint: str | None = flag(
        None, "folder of the base weights: Hugging Face safetensors or megalora shards", unset="model_path"
    )
    resume_peft_from_checkpoint: str | None = flag(
        None,
        "adapter to load: a run's output_dir, megalora shards or a PEFT folder",
        unset="a new adapter, in generation none",
    )
    lora_config: str | None = flag(
        None, "path of lora_config.json, for a new adapter", unset="by model_type", training_only=True
    )
    dtype: str = flag(
        "auto",
        "compute precision; auto is bfloat16 on GPUs and float32 on CPUs",
        choices=("auto", "bfloat16", "float16", "float32", "float64"),
    )


def _partition_flag(default: str) -> Any:
    return flag(
        default,
        "how layers are dealt to stages; cost: by counted time, so that no stage is slower than it must be",
        choices=("uniform", "uniform_floor", "parameters", "cost", "custom"),
    )


@dataclass(frozen=True)
class LayoutArguments(Section):
    """How a model is cut."""

    tensor_parallel_size: int = flag(1, "processes that share each layer", at_least=1)
    pipeline_parallel_size: int = flag(1, "pipeline stages the layers are cut into", at_least=1)
    partition_method: str = _partition_flag("uniform")
    custom_partition: tuple[int, ...] | None = flag(
        None, "layers of each stage, first to last, for partition_method custom", at_least=1, unset="none"
    )
    uneven_heads: bool = flag(
        False, "allow a tensor_parallel_size that does not divide the attention heads: slower, but it runs"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition_method == "custom" and self.custom_partition is None:
            raise UserError(
                "partition_method custom needs custom_partition: the layers of each of the "
                f"{self.pipeline_parallel_size} stages, such as --custom_partition "
                f"{' '.join(['8'] * self.pipeline_parallel_size)}"
            )
        if self.custom_partition is not None and self.partition_method != "custom":
            raise UserError(_no_effect("custom_partition", self.custom_partition, vars(self)))
        parts = self.pipeline_parallel_size * self.chunks
        if self.custom_partition is not None and len(self.custom_partition) != parts:
            what, size = "stage", "pipeline_parallel_size"
            if self.chunks > 1:
                what, size = "chunk", "pipeline_parallel_size * virtual_pipeline_size"
            raise UserError(
                f"custom_partition {_show(self.custom_partition)} names {len(self.custom_partition)} {what}s, but "
                f"{size} is {parts}: give one number of layers a {what}"
            )

    @property
    def chunks(self) -> int:
        """Chunks of layers that each stage holds."""
        return 1


@dataclass(frozen=True)
class ParallelArguments(LayoutArguments):
    """How the model lies over the processes. Data parallel size = world size / (tensor * pipeline)."""

    partition_method: str = _partition_flag("cost")
    sequence_parallel: bool | None = flag(
        None,
        "split the activations between layers along the tokens, over tensor parallel",
        unset="with tensor parallel, where it divides a microbatch's tokens",
        training_only=True,
    )
    tp_comm_overlap: bool | None = flag(
        None,
        "with sequence_parallel, send activations by copies between the GPUs while products run, not by NCCL",
        unset="where the GPUs of a group reach each other's memory",
        training_only=True,
    )
    schedule: str = flag(
        "1f1b", "order of the microbatches in the pipeline", choices=tuple(SCHEDULES), training_only=True
    )
    virtual_pipeline_size: int = flag(
        1, "chunks of layers each stage holds, for schedule interleaved_1f1b", at_least=1, training_only=True
    )
    recompute: str = flag(
        "none",
        "activations computed again in backward: none, attention only, or whole layers",
        choices=("none", "selective", "full"),
        training_only=True,
    )
    heartbeat_timeout: float = flag(
        30.0, "seconds without a sign of life after which a rank is taken for dead and the run ends", at_least=5
    )
    profile_file: str | None = flag(
        None,
        "trace.json of a run with profile, whose seconds partition_method cost balances",
        unset="counted seconds",
        training_only=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_schedule()
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise UserError(_no_effect("sequence_parallel", True, vars(self)))
        if self.profile_file is not None and self.partition_method != "cost":
            raise UserError(_no_effect("profile_file", self.profile_file, vars(self)))

    @property
    def chunks(self) -> int:
        return self.virtual_pipeline_size

    def for_tokens(self, tokens: int) -> ParallelArguments:
        """With what the flags left open, for microbatches of so many tokens on a replica."""
        if self.sequence_parallel is not None:
            return self
        tp = self.tensor_parallel_size
        return replace(self, sequence_parallel=tp > 1 and tokens % tp == 0)

    def _check_schedule(self) -> None:
        schedule = SCHEDULES[self.schedule]
        if self.virtual_pipeline_size > 1 and not schedule.chunked:
            raise UserError(_no_effect("virtual_pipeline_size", self.virtual_pipeline_size, vars(self)))
        if schedule.chunked and (self.virtual_pipeline_size == 1 or self.pipeline_parallel_size == 1):
            raise UserError(
                f"schedule {self.schedule} needs a pipeline_parallel_size (it is {self.pipeline_parallel_size}) and a "
                f"virtual_pipeline_size (it is {self.virtual_pipeline_size}) of 2 or more: give both, or another "
                f"schedule"
            )
        if self.recompute == "full" and schedule.recomputes(0, max(2, self.pipeline_parallel_size)):
            raise UserError(
                f"recompute full and schedule {self.schedule}: the schedule computes whole stages again already, and "
                f"layers would be computed three times: leave one of them out"
            )


def _template_kwargs_flag() -> Any:
    return flag(
        None, """variables of the chat template, as JSON: '{"enable_thinking": false}'""", unset="the template's"
    )


def _special_tokens_flag() -> Any:
    return flag(False, "special tokens written in messages are special tokens, not text")


def _template_kwargs(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f'chat_template_kwargs {text!r}: is not JSON ({error}); write {{"name": value}}') from None
    if not isinstance(found, dict):
        raise UserError(f'chat_template_kwargs {text!r}: is not a JSON object; write {{"name": value}}')
    return found


@dataclass(frozen=True)
class DataArguments(Section):
    """Rows to train on, and how they become tokens."""

    data_path: str = flag(
        REQUIRED,
        "training rows: files, folders or datasets separated by commas, each with :WEIGHT behind it or not "
        "(json, jsonl, csv, tsv, parquet, arrow; also .gz, .zst)",
    )
    eval_data_path: str | None = flag(None, "evaluation rows, same formats", unset="no evaluation")
    eval_fraction: float | None = flag(
        None, "share of the training rows that is held out for evaluation", above=0, below=1, unset="none"
    )
    max_rows: int | None = flag(None, "read only the first rows of each file or dataset", at_least=1, unset="all")
    columns: tuple[str, ...] | None = flag(
        None, "names of fields in your rows, as ours=yours: output=reply instruction=ask", verbatim=True, unset="ours"
    )
    ignore_columns: tuple[str, ...] | None = flag(
        None, "fields of the rows that are left out, beside those known to be harmless", verbatim=True, unset="none"
    )
    seq_length: int = flag(1024, "tokens of one row of a microbatch; for longer documents see on_long_row", at_least=2)
    packing: bool = flag(True, "put several whole documents in one row; attention never crosses them")
    template: str | None = flag(None, "chat template: a built-in name or a jinja file", unset="the tokenizer's own")
    chat_template_kwargs: str | None = _template_kwargs_flag()
    history_thinking: str = flag(
        "split",
        "an earlier reply whose thinking the template drops: a document of its own, not learned, or thinking kept",
        choices=("split", "mask", "keep"),
    )
    special_tokens_in_text: bool = _special_tokens_flag()
    train_on: str = flag(
        "all",
        "what is learned: all replies, the last of each row, or the prompts too",
        choices=("all", "last", "prompt"),
    )
    on_bad_row: str = flag(
        "error", "stop at rows that cannot be used, or count them and go on", choices=("error", "skip")
    )
    on_long_row: str = flag(
        "error",
        "what becomes of a row longer than seq_length: a bad row, left out, cut, or split at its turns",
        choices=("error", "skip", "truncate", "split"),
    )
    data_cache: str | None = flag(
        None, "folder that keeps the tokens of the rows, for other runs too", unset="~/.cache/megalora"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_fraction is not None and self.eval_data_path is not None:
            raise UserError("eval_fraction and eval_data_path both name evaluation rows: leave one of them out")
        for pair in self.columns or ():
            if not re.fullmatch(r"[^=]+=[^=]+", pair):
                raise UserError(f"columns {pair!r}: write it as ours=yours, such as output=reply")
        if len(self.renamed_columns) != len(self.columns or ()):
            raise UserError("columns names one of your fields twice: keep one")
        _template_kwargs(self.chat_template_kwargs)

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return _template_kwargs(self.chat_template_kwargs)

    @property
    def renamed_columns(self) -> dict[str, str]:
        """Our name of a field by the user's."""
        pairs = (pair.split("=") for pair in self.columns or ())
        return {yours.strip(): ours.strip() for ours, yours in pairs}


@dataclass(frozen=True)
class TrainArguments(Section):
    """The run: optimizer, length, what is written and when. A step is one optimizer step."""

    output_dir: str = flag(REQUIRED, "folder of the run: checkpoints, metrics.jsonl, TensorBoard")
    overwrite_output_dir: bool = flag(False, "start afresh even where output_dir holds checkpoints")
    per_device_train_batch_size: int = flag(1, "rows of one microbatch of one data-parallel rank", at_least=1)
    gradient_accumulation_steps: int = flag(1, "microbatches of one step of one data-parallel rank", at_least=1)
    num_train_epochs: float | None = flag(
        None,
        "passes over the data; with max_steps, whichever ends first",
        above=0,
        unset="3.0, or none with max_steps",
    )
    max_steps: int | None = flag(None, "steps of the run", at_least=1, unset="by num_train_epochs")
    learning_rate: float = flag(2e-4, "peak learning rate", at_least=0)
    lr_scheduler_type: str = flag(
        "linear", "shape of the learning rate after warmup", choices=("linear", "cosine", "constant")
    )
    warmup_steps: int = flag(0, "steps over which the learning rate rises from 0", at_least=0)
    weight_decay: float = flag(0.0, "AdamW weight decay", at_least=0)
    adam_beta1: float = flag(0.9, "AdamW beta1", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "AdamW beta2", at_least=0, below=1)
    adam_epsilon: float = flag(1e-8, "AdamW epsilon", above=0)
    optimizer: str = flag(
        "adamw", "adamw is torch's fused AdamW, apex is NVIDIA apex's FusedAdam", choices=("adamw", "apex")
    )
    max_grad_norm: float = flag(1.0, "gradients are clipped to this global norm; 0 is no clipping", at_least=0)
    seed: int = flag(42, "seed of adapters, dropout and the order of the rows", at_least=0, at_most=2**63 - 1)
    eval_steps: int | None = flag(None, "steps from one evaluation to the next", at_least=1, unset="at the end only")
    save: bool = flag(True, "write checkpoints")
    save_steps: int = flag(500, "steps from one checkpoint to the next; the last step always has one", at_least=1)
    save_total_limit: int | None = flag(None, "newest checkpoints that are kept", at_least=1, unset="all")
    logging_steps: int = flag(1, "steps from one line of the log to the next", at_least=1)
    cuda_graphs: bool | None = flag(
        None,
        "run the layers as CUDA graphs, the same numbers sooner",
        unset="where they serve: a replica without pipeline stages",
    )
    deterministic: bool = flag(
        False, "on a GPU, repeats of a run are equal to the bit: attention sums in a fixed order, which takes longer"
    )
    wall_clock_breakdown: bool = flag(False, "log seconds by phase: forward, backward, communication, ...")
    hang_timeout: float = flag(
        600.0, "seconds without progress of any rank after which all say where they stand and end; 0: never", at_least=0
    )
    log_dir: str | None = flag(None, "folder of the log files, one a rank", unset="logs in output_dir")
    profile: bool = flag(False, "record when each stage computed, into output_dir/profile: a Chrome trace, a drawing")
    profile_steps: int = flag(2, "steps that profile records, from the run's second on", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps is not None:
            self._check_warmup(self.max_steps)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run, given those of one pass over the data (at least 1).

        The run ends at max_steps or after num_train_epochs (rounded up to a whole step), whichever is first;
        neither given is 3 epochs. UserError where the run would end inside its warmup.
        """
        assert steps_per_epoch >= 1, steps_per_epoch
        if self.num_train_epochs is None:
            steps = self.max_steps or 3 * steps_per_epoch
        else:
            # As written: 1.1 in binary is a little more, and 1.1 epochs of 100 steps would be 111.
            steps = math.ceil(Fraction(str(self.num_train_epochs)) * steps_per_epoch)
            steps = min(steps, self.max_steps or steps)
        self._check_warmup(steps)
        return steps

    def _check_warmup(self, steps: int) -> None:
        if self.warmup_steps and self.warmup_steps >= steps:
            raise UserError(
                f"warmup_steps ({self.warmup_steps}) is not less than the steps of the run ({steps}): the "
                "learning rate would never reach learning_rate; give fewer warmup_steps or a longer run"
            )


@dataclass(frozen=True)
class GenerationArguments(Section):
    """Prompts and decoding. Without prompt and prompts_file it is a dialogue at the terminal."""

    prompt: str | None = flag(None, "one prompt", unset="a dialogue")
    prompts_file: str | None = flag(
        None, "file of prompts: one a line, or JSON rows as for training", unset="a dialogue"
    )
    output_file: str | None = flag(None, "file for the replies, JSON lines", unset="the terminal")
    system: str | None = flag(None, "system message put before each prompt", unset="the template's", empty=True)
    max_new_tokens: int = flag(256, "longest reply, tokens", at_least=1)
    temperature: float | None = flag(
        None, "softmax temperature; 0 is greedy", at_least=0, unset="generation_config.json's, else 0"
    )
    top_k: int | None = flag(
        None,
        "sample among this many likeliest tokens; 0 is all",
        at_least=0,
        unset="generation_config.json's, else all",
    )
    top_p: float | None = flag(
        None,
        "sample among the likeliest tokens that hold this probability",
        above=0,
        at_most=1,
        unset="generation_config.json's, else all",
    )
    min_p: float | None = flag(
        None,
        "sample among the tokens at least this probable, as a share of the likeliest",
        at_least=0,
        at_most=1,
        unset="generation_config.json's, else all",
    )
    repetition_penalty: float | None = flag(
        None,
        "divides the logits of tokens that are there already, where positive; 1 is none",
        above=0,
        unset="generation_config.json's, else 1",
    )
    stop: tuple[str, ...] | None = flag(
        None, r"texts that end a reply and are no part of it; \n, \t and \\ are escapes", verbatim=True, unset="none"
    )
    seed: int | None = flag(None, "seed of the sampling", at_least=0, at_most=2**63 - 1, unset="42")
    template: str | None = flag(
        None, "chat template: a built-in name or a jinja file", unset="the adapter's own, else the tokenizer's"
    )
    chat_template_kwargs: str | None = _template_kwargs_flag()
    special_tokens_in_text: bool = _special_tokens_flag()
    seq_length: int | None = flag(
        None,
        "longest prompt and reply together, tokens",
        at_least=2,
        unset="the model's max_position_embeddings",
    )
    disable_adapter: bool = flag(False, "reply from the base model, without resume_peft_from_checkpoint")
    compare_base: bool = flag(False, "the replies of the base model beside those with the adapter")
    show_thinking: bool = flag(False, "show the thinking of a reply (between its think tags), apart from the answer")
    return_logits: bool = flag(False, "also write the logits of each prompt, as safetensors")
    logits_dir: str = flag("logits", "folder of the logits of return_logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompts_file is not None:
            raise UserError("prompt and prompts_file are both given: give one of them")
        if self.compare_base and self.disable_adapter:
            raise UserError("compare_base and disable_adapter are both true: give one of them")
        _template_kwargs(self.chat_template_kwargs)

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return _template_kwargs(self.chat_template_kwargs)


@dataclass(frozen=True)
class PlanArguments(Section):
    """`megalora plan`: the GPUs, the run, and what is fixed of its layout; the rest is searched for.

    Rows of a step: global_batch_size, or per_device_train_batch_size * gradient_accumulation_steps of each
    data-parallel rank, whichever is given.
    """

    model_path: str = flag(REQUIRED, "Hugging Face folder of the model, or its config.json alone")
    gpus: int = flag(REQUIRED, "GPUs of the run", at_least=1)
    lora_config: str | None = flag(None, "path of lora_config.json", unset="by model_type")
    device: str = flag("h100", "kind of the GPUs (or CPUs), for their speed", choices=("h100", "h200", "a100", "cpu"))
    memory: float | None = flag(None, "memory of each GPU, GiB", above=0, unset="by device")
    reserve: float = flag(
        4.0, "GiB of it that stay free: CUDA's context, NCCL's buffers, fragments of the allocator", at_least=0
    )
    gpus_per_node: int = flag(8, "GPUs that a fast link joins", at_least=1)
    seq_length: int = flag(1024, "tokens of one row of a microbatch", at_least=2)
    global_batch_size: int | None = flag(
        None,
        "rows of a step over all GPUs",
        at_least=1,
        unset="128, or the next multiple of gpus; or by gradient_accumulation_steps",
    )
    per_device_train_batch_size: int | None = flag(
        None, "rows of one microbatch", at_least=1, unset="searched, or 1 with gradient_accumulation_steps"
    )
    gradient_accumulation_steps: int | None = flag(
        None, "microbatches of one step of one data-parallel rank", at_least=1, unset="by global_batch_size"
    )
    tensor_parallel_size: int | None = flag(None, "processes that share each layer", at_least=1, unset="searched")
    pipeline_parallel_size: int | None = flag(None, "pipeline stages", at_least=1, unset="searched")
    sequence_parallel: bool | None = flag(
        None, "split the activations between layers over tensor parallel", unset="with tensor parallel"
    )
    partition_method: str = flag(
        "cost", "how layers are dealt to stages", choices=("uniform", "uniform_floor", "parameters", "cost", "custom")
    )
    custom_partition: tuple[int, ...] | None = flag(
        None, "layers of each stage, for partition_method custom", at_least=1, unset="none"
    )
    uneven_heads: bool = flag(False, "also try tensor-parallel sizes that do not divide the attention heads")
    schedule: str | None = flag(
        None, "order of the microbatches in the pipeline", choices=tuple(SCHEDULES), unset="searched"
    )
    virtual_pipeline_size: int | None = flag(
        None, "chunks of layers a stage, for schedule interleaved_1f1b", at_least=1, unset="searched"
    )
    recompute: str | None = flag(
        None, "activations computed again in backward", choices=("none", "selective", "full"), unset="searched"
    )
    dtype: str = flag("bfloat16", "compute precision", choices=("bfloat16", "float16", "float32"))
    profile_file: str | None = flag(
        None, "trace.json of a run of this model with profile, whose speed is taken", unset="speeds of device"
    )
    draw: str | None = flag(None, "SVG file for the timeline of a step of the best layout", unset="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.partition_method == "custom") != (self.custom_partition is not None):
            raise UserError("partition_method custom and custom_partition go together: give both or neither")
        if self.custom_partition is not None and self.pipeline_parallel_size is None:
            raise UserError("custom_partition needs pipeline_parallel_size: it is one number of layers a stage")


@dataclass(frozen=True)
class DoctorArguments(Section):
    """What a run would need of its hosts. Under torchrun also the links of the mesh are measured."""

    output_dir: str = flag(".", "folder that the run would write to: free space, the same on all hosts")
    free_space: float = flag(2.0, "GiB that must be free in output_dir", at_least=0)
    tensor_parallel_size: int = flag(1, "processes that share each layer", at_least=1)
    pipeline_parallel_size: int = flag(1, "pipeline stages the layers are cut into", at_least=1)


@dataclass(frozen=True)
class PreviewArguments(Section):
    """Which rows `megalora data` shows, as the run would see them; the rest are counted."""

    model_path: str = flag(REQUIRED, "Hugging Face folder of the model: its tokenizer and chat template are used")
    rows: int = flag(3, "rows that are shown, from the first on", at_least=0)
    row: int | None = flag(
        None, "show this row alone, by its number over all files", at_least=0, unset="the first rows"
    )


@dataclass(frozen=True)
class CompatibilityArguments(Section):
    """Flags of the reference launch that state what always holds here, or spell a flag above in another way.

    They end in the other sections (fp16 and bf16 in `dtype`) or in an error; no part of the package sees
    them.
    """

    fp16: bool | None = flag(None, "true is dtype float16", unset="by dtype")
    bf16: bool | None = flag(None, "true is dtype bfloat16; false keeps dtype auto from choosing it", unset="by dtype")
    split_method: str = flag("layer_split", "only layer_split: stages are cut between layers")
    input_names: tuple[str, ...] = flag(
        ("input_ids", "attention_mask"),
        "inputs of the model, input_ids among them",
        choices=("input_ids", "attention_mask", "labels", "position_ids"),
    )
    no_tie_modules: bool = flag(True, "only true: a frozen tied head is a copy on the last stage, no tie is kept up")
    return_logits: bool = flag(False, "generation only (there it writes logits): training takes false")
    text_generation: bool | None = flag(
        None, "generation only, and only true: the logits become text", unset="by command"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fp16 and self.bf16:
            raise UserError("fp16 and bf16 are both true: give one of them")
        if self.split_method != "layer_split":
            raise UserError(
                f"split_method {self.split_method} is not supported: stages are cut between layers, from the "
                "model's config, and no graph is traced; give layer_split and choose the cuts by "
                "partition_method"
            )
        if "input_ids" not in self.input_names:
            raise UserError(f"input_names {_show(self.input_names)} lacks input_ids: the models here read token ids")
        if not self.no_tie_modules:
            raise UserError(
                "no_tie_modules false is not supported: the base is frozen, so a tied head is "
                "copied to the last "
                "stage and nothing needs to be kept tied; give true or leave it out"
            )


@dataclass(frozen=True)
class ConvertArguments(Section):
    """What is read and what is written. All is checked before the first byte; the output appears when it is whole."""

    input: str = flag(REQUIRED, "what is converted: a folder, an adapter's run, for from-gguf a .gguf file")
    output: str = flag(REQUIRED, "folder to write; it is never the input's own")
    overwrite: bool = flag(False, "replace a model or an adapter that is there already, once the new one is whole")
    dry_run: bool = flag(False, "say what would be written, after all checks, and write nothing")


@dataclass(frozen=True)
class BaseArguments(Section):
    """The model that an adapter belongs to."""

    base: str | None = flag(
        None,
        "base model of the adapter: a Hugging Face folder, or shards",
        unset="what the adapter itself names, where that is a folder",
    )


@dataclass(frozen=True)
class SafetensorsArguments(Section):
    """How a Hugging Face folder is written."""

    max_shard_size: float = flag(5.0, "largest safetensors file, in GB (10^9 bytes)", above=0)


@dataclass(frozen=True)
class FinetuneArguments:
    """What `megalora finetune` runs on."""

    model: ModelArguments
    parallel: ParallelArguments
    data: DataArguments
    train: TrainArguments


@dataclass(frozen=True)
class GenerateArguments:
    """What `megalora generate` runs on. `not_applied`: training flags that were given and do not apply."""

    model: ModelArguments
    parallel: ParallelArguments
    generation: GenerationArguments
    not_applied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """What `megalora convert COMMAND` runs on; a section that the command does not take has its defaults."""

    command: str
    paths: ConvertArguments
    layout: LayoutArguments = field(default_factory=LayoutArguments)
    base: BaseArguments = field(default_factory=BaseArguments)
    safetensors: SafetensorsArguments = field(default_factory=SafetensorsArguments)


@dataclass(frozen=True)
class Preview:
    """Arguments of `megalora data`."""

    shown: PreviewArguments
    data: DataArguments


PREVIEW_SECTIONS = (PreviewArguments, DataArguments)
# What only the run itself does with the rows.
_NOT_PREVIEWED = ("eval_data_path", "eval_fraction", "data_cache", "packing", "on_bad_row")
FINETUNE_SECTIONS = (ModelArguments, ParallelArguments, DataArguments, TrainArguments, CompatibilityArguments)
GENERATE_SECTIONS = (ModelArguments, ParallelArguments, GenerationArguments, CompatibilityArguments)
CONVERT_COMMANDS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "to-shards": (
        "base weights, from a Hugging Face folder, to shards: mp_rank_XX_pp_rank_YYY/partial_model_optim.pt",
        (ConvertArguments, LayoutArguments),
    ),
    "to-hf": ("base weights, from shards, to a Hugging Face folder", (ConvertArguments, SafetensorsArguments)),
    "reshard": ("shards of base weights to shards of another layout", (ConvertArguments, LayoutArguments)),
    "from-gguf": (
        "a GGUF file to a Hugging Face folder in float32; the whole model is in memory",
        (ConvertArguments,),
    ),
    "adapter to-peft": (
        "an adapter (a run, its checkpoint, shards) to a PEFT folder; --base is the name of the model to write in it",
        (ConvertArguments, BaseArguments),
    ),
    "adapter from-peft": (
        "an adapter (a PEFT folder) to shards: mp_rank_XX_pp_rank_YYY/lora_partial_model_optim.pt",
        (ConvertArguments, BaseArguments, LayoutArguments),
    ),
    "adapter merge": (
        "an adapter (any of these) into a copy of its base, as a Hugging Face folder; summed in float32",
        (ConvertArguments, BaseArguments, SafetensorsArguments),
    ),
}
"""The commands of `megalora convert`, as words after it: what each does, and the sections of its flags."""


@dataclass(frozen=True)
class _Idle:
    """`flag` has no effect because of the value of `because`, when `when(values of all flags)`."""

    flag: str
    because: str
    when: Callable[[Mapping[str, Any]], bool]
    remedy: str


_CUSTOM = _Idle(
    "custom_partition",
    "partition_method",
    lambda v: v["partition_method"] != "custom",
    "give --partition_method custom",
)
FINETUNE_IDLE = (
    _CUSTOM,
    _Idle(
        "virtual_pipeline_size",
        "schedule",
        lambda v: v["virtual_pipeline_size"] > 1 and not SCHEDULES[v["schedule"]].chunked,
        "give --schedule interleaved_1f1b",
    ),
    _Idle(
        "sequence_parallel",
        "tensor_parallel_size",
        lambda v: v["sequence_parallel"] and v["tensor_parallel_size"] == 1,
        "give --tensor_parallel_size 2 or more",
    ),
    _Idle("save_steps", "save", lambda v: not v["save"], "give --save true"),
    _Idle("save_total_limit", "save", lambda v: not v["save"], "give --save true"),
    _Idle("profile_steps", "profile", lambda v: not v["profile"], "give --profile true"),
    _Idle(
        "profile_file",
        "partition_method",
        lambda v: v["partition_method"] != "cost",
        "give --partition_method cost",
    ),
    _Idle(
        "eval_steps",
        "eval_data_path",
        lambda v: v["eval_data_path"] is None and v["eval_fraction"] is None,
        "give --eval_data_path or --eval_fraction",
    ),
)
GENERATE_IDLE = (
    _CUSTOM,
    _Idle("top_k", "temperature", lambda v: v["temperature"] == 0, "give a --temperature above 0"),
    _Idle("top_p", "temperature", lambda v: v["temperature"] == 0, "give a --temperature above 0"),
    _Idle("min_p", "temperature", lambda v: v["temperature"] == 0, "give a --temperature above 0"),
    _Idle("logits_dir", "return_logits", lambda v: not v["return_logits"], "give --return_logits true"),
    _Idle(
        "compare_base",
        "resume_peft_from_checkpoint",
        lambda v: v["compare_base"] and v["resume_peft_from_checkpoint"] is None,
        "give --resume_peft_from_checkpoint",
    ),
    _Idle(
        "output_file",
        "prompt",
        lambda v: v["prompt"] is None and v["prompts_file"] is None,
        "give --prompt or --prompts_file",
    ),
    _Idle(
        "disable_adapter",
        "resume_peft_from_checkpoint",
        lambda v: v["disable_adapter"] and v["resume_peft_from_checkpoint"] is None,
        "give --resume_peft_from_checkpoint",
    ),
)


CONVERT_IDLE = (_CUSTOM,)


def _no_effect(name: str, value: Any, values: Mapping[str, Any], label: str | None = None) -> str:
    rule = next(rule for rule in (*FINETUNE_IDLE, *GENERATE_IDLE) if rule.flag == name)
    reason = values[rule.because]
    cause = f"without {rule.because}" if reason is None else f"with {rule.because} {_show(reason)}"
    return f"{label or name} {_show(value)} has no effect {cause}: {rule.remedy}, or leave it out"


# --------------------------------------------------------------------------------------------- entry points


def parse_finetune(argv: Sequence[str]) -> FinetuneArguments:
    """Flags of `megalora finetune`. UserError for what is wrong, missing, unknown or without effect."""
    table = _table(FINETUNE_SECTIONS)
    elsewhere = {name: "tools/generate.py" for name in _table(GENERATE_SECTIONS) if name not in table}
    given = _read(argv, table, elsewhere)
    for name in ("return_logits", "text_generation"):
        if name in given and given[name].value:
            raise UserError(
                f"{given[name].label} true belongs to generation: run tools/generate.py with these flags, or "
                "leave it out to train"
            )
    given = _without_idle(given, table, FINETUNE_IDLE)
    _require(given, table)
    model, parallel, data, train = _sections(given, FINETUNE_SECTIONS)
    return FinetuneArguments(model, parallel, data, train)


def parse_generate(argv: Sequence[str]) -> GenerateArguments:
    """Flags of `megalora generate`. Training flags are checked like others, then named in `not_applied`."""
    applying = {
        name: entry for name, entry in _table(GENERATE_SECTIONS).items() if not entry.limits.get("training_only")
    }
    given = _read(argv, {**_table(FINETUNE_SECTIONS), **applying}, {})
    if "text_generation" in given and not given["text_generation"].value:
        raise UserError(
            f"{given['text_generation'].label} false is not supported: generation turns the last stage's logits into "
            "text; give true or leave it out"
        )
    not_applied = [name for name in given if name not in applying]
    given = {name: one for name, one in given.items() if name in applying}
    given = _without_idle(given, applying, GENERATE_IDLE)
    _require(given, applying)
    model, parallel, generation = _sections(given, GENERATE_SECTIONS)
    if "seed" in given and generation.temperature == 0:
        not_applied.append("seed")
    return GenerateArguments(model, parallel, generation, tuple(not_applied))


def parse_doctor(argv: Sequence[str]) -> DoctorArguments:
    """Flags of `megalora doctor`. UserError for what is wrong or unknown."""
    return DoctorArguments(**{name: one.value for name, one in _read(argv, _table((DoctorArguments,)), {}).items()})


def parse_preview(argv: Sequence[str]) -> Preview:
    """Flags of `megalora data`. UserError as `parse_finetune`."""
    table = {name: entry for name, entry in _table(PREVIEW_SECTIONS).items() if name not in _NOT_PREVIEWED}
    elsewhere = {name: "megalora finetune" for name in _table(FINETUNE_SECTIONS) if name not in table}
    given = _read(argv, table, elsewhere)
    _require(given, table)
    if "row" in given and "rows" in given:
        raise UserError("row and rows are both given: leave one of them out")
    shown, data = (
        section(**{one.name: given[one.name].value for one in flags_of(section) if one.name in given})
        for section in PREVIEW_SECTIONS
    )
    return Preview(shown, data)


def parse_convert(argv: Sequence[str]) -> Conversion:
    """Command and flags of `megalora convert`. UserError as `parse_finetune`."""
    command = convert_command(argv)
    _, sections = CONVERT_COMMANDS[command]
    table = _table(sections)
    elsewhere = {
        name: f"megalora convert {other}"
        for other, (_, theirs) in reversed(CONVERT_COMMANDS.items())
        for name in _table(theirs)
        if name not in table
    }
    given = _without_idle(_read(argv[len(command.split()) :], table, elsewhere), table, CONVERT_IDLE)
    _require(given, table)
    made = {
        section: section(**{one.name: given[one.name].value for one in flags_of(section) if one.name in given})
        for section in sections
    }
    names = {
        ConvertArguments: "paths",
        LayoutArguments: "layout",
        BaseArguments: "base",
        SafetensorsArguments: "safetensors",
    }
    return Conversion(command, **{names[section]: value for section, value in made.items()})


def convert_command(argv: Sequence[str]) -> str:
    """The command that the words after `megalora convert` begin with. UserError where they begin with none."""
    words = list(argv)
    for command in CONVERT_COMMANDS:
        if words[: len(command.split())] == command.split():
            return command
    groups = {command.split()[0] for command in CONVERT_COMMANDS if " " in command}
    said = " ".join(words[: 2 if words[:1] and words[0] in groups else 1])
    what = f"unknown command convert {said}" if said else "convert needs a command"
    raise UserError(f"{what}: give one of {', '.join(CONVERT_COMMANDS)} (megalora convert --help)")


def parse_plan(argv: Sequence[str]) -> PlanArguments:
    """Flags of `megalora plan`. UserError as `parse_finetune`."""
    table = _table([PlanArguments])
    elsewhere = {name: "megalora finetune" for name in _table(FINETUNE_SECTIONS) if name not in table}
    given = _read(argv, table, elsewhere)
    _require(given, table)
    return PlanArguments(**{name: one.value for name, one in given.items()})


def validate_world(parallel: ParallelArguments, world_size: int) -> int:
    """Data-parallel size: world_size / (tensor * pipeline). UserError where that is not whole."""
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    model = tensor * pipeline
    if world_size % model == 0 and world_size > 0:
        return world_size // model
    below = world_size // model * model
    counts = f"{below} or {below + model}" if below else str(model)
    raise UserError(
        f"World size ({world_size}) is not a multiple of tensor_parallel_size ({tensor}) * "
        f"pipeline_parallel_size ({pipeline}) = {model}: start {counts} processes, or choose sizes whose "
        f"product divides {world_size}"
    )


def help_text(command: str) -> str:
    """What `megalora COMMAND --help` prints, for every command and convert COMMAND."""
    sections = {
        "finetune": FINETUNE_SECTIONS,
        "generate": GENERATE_SECTIONS,
        "plan": (PlanArguments,),
        "doctor": (DoctorArguments,),
        "data": PREVIEW_SECTIONS,
    } | {f"convert {name}": theirs for name, (_, theirs) in CONVERT_COMMANDS.items()}
    if command == "convert":
        return _convert_help()
    sections = sections[command]
    lines = [
        f"usage: megalora {command} [RUN.yaml] --FLAG VALUE ...",
        "",
        "Flags may be written with _ or -. A boolean is true or false; the bare flag is true.",
        "RUN.yaml (or --config RUN.yaml) holds the same names, one `name: value` a line; a flag on the",
        "command line goes before it.",
    ]
    for section in sections:
        lines += ["", *textwrap.wrap(f"{_title(section)}: {_first_paragraph(section)}", 110)]
        for entry in flags_of(section):
            if command == "generate" and entry.limits.get("training_only"):
                continue
            if command == "data" and entry.name in _NOT_PREVIEWED:
                continue
            lines.append(f"  --{entry.name} {entry.values()}")
            lines += textwrap.wrap(
                f"{entry.help} ({entry.default_text()})",
                110,
                initial_indent=" " * 6,
                subsequent_indent=" " * 6,
            )
    if command == "generate":
        lines += [
            "",
            "The other flags of megalora finetune are accepted, and named on one line as not applied.",
        ]
    return "\n".join(lines)


def _convert_help() -> str:
    """What `megalora convert --help` prints."""
    width = max(map(len, CONVERT_COMMANDS))
    commands = [
        line
        for name, (what, _) in CONVERT_COMMANDS.items()
        for line in textwrap.wrap(f"  {name:{width}}  {what}", 110, subsequent_indent=" " * (width + 4))
    ]
    usage = "usage: megalora convert COMMAND --input IN --output OUT ..."
    return "\n".join([usage, "", *commands, "", "COMMAND --help lists its flags."])


def flags_table() -> str:
    """All flags as markdown tables, one a section, for the README."""
    lines = []
    others = (ConvertArguments, BaseArguments, SafetensorsArguments, PreviewArguments, PlanArguments)
    for section in (*FINETUNE_SECTIONS[:-1], GenerationArguments, CompatibilityArguments, *others):
        lines += ["", f"**{_title(section)}**: {_first_paragraph(section)}", ""]
        lines += ["| flag | values | default | what it does |", "|---|---|---|---|"]
        for entry in flags_of(section):
            default = "required" if entry.required else entry.default_text().removeprefix("default: ")
            values = entry.values().replace("|", "\\|")
            lines.append(f"| `{entry.name}` | {values} | {default} | {entry.help} |")
    return "\n".join(lines[1:])


# --------------------------------------------------------------------------------- one flag, and its values


@dataclass(frozen=True)
class Flag:
    """One row of the table, from a dataclass field. `type` is bool, int, float or str (of each item)."""

    name: str
    type: type
    many: bool
    optional: bool
    default: Any
    help: str
    limits: Mapping[str, Any]

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def values(self) -> str:
        """What to write after the flag: true|false, a|b, N, X or TEXT, and ... where it takes several."""
        plain = {bool: "true|false", int: "N", float: "X", str: "TEXT"}[self.type]
        return ("|".join(self.limits.get("choices", ())) or plain) + (" ..." if self.many else "")

    def default_text(self) -> str:
        if self.required:
            return "required"
        return f"default: {self.limits['unset'] if self.default is None else _show(self.default)}"

    def from_text(self, texts: Sequence[str], label: str) -> Any:
        """Value of the words after a flag; `label` names the flag in an error."""
        if self.many and self.limits.get("verbatim"):
            value: Any = tuple(texts)
        elif self.many:
            words = [word for text in texts for word in re.split(r"[,\s]+", text) if word]
            if not words:
                raise UserError(f"{label} needs one or more values: {self._kind()}")
            value = tuple(self._scalar(word, label) for word in words)
        else:
            (text,) = texts
            value = self._scalar(text, label)
        self.check(value, label)
        return value

    def from_yaml(self, value: Any, label: str) -> Any:
        """Value of a YAML node. A text is read as on the command line (YAML takes 2e-4 for a text)."""
        items = value if isinstance(value, list) and self.many else [value]
        if all(isinstance(item, str) for item in items):
            return self.from_text(items, label)
        fits = {
            bool: lambda item: isinstance(item, bool) or item in (0, 1),
            int: lambda item: isinstance(item, int) and not isinstance(item, bool),
            float: lambda item: isinstance(item, (int, float)) and not isinstance(item, bool) and abs(item) < 1e300,
            str: lambda item: isinstance(item, str),
        }[self.type]
        for item in items:
            if isinstance(item, (list, dict)) or not fits(item):
                quotes = ", in quotes" if self.type is str else ""
                raise UserError(f"{label}: {_show(item)} is not {self._kind()}{quotes}")
        read = tuple(self.type(item) for item in items)
        result = read if self.many else read[0]
        self.check(result, label)
        return result

    def check(self, value: Any, label: str) -> None:
        """UserError where the value is outside the limits."""
        if value is None and self.optional:
            return
        for item in value if self.many else (value,):
            problem = self._problem(item)
            if problem:
                raise UserError(f"{label} {_show(value)}: {problem}")

    def _problem(self, item: Any) -> str | None:
        accepted = {bool: bool, int: int, float: (int, float), str: object}[self.type]
        if not isinstance(item, accepted) or (self.type is not bool and isinstance(item, bool)):
            return f"must be {self._kind()}"
        limits = self.limits
        if "choices" in limits and item not in limits["choices"]:
            return f"must be one of {', '.join(limits['choices'])}"
        blank = not str(item) if limits.get("verbatim") else not str(item).strip()
        if self.type is str and blank and "choices" not in limits and not limits.get("empty"):
            return "is empty; give a value or leave the flag out"
        if self.type is float and not math.isfinite(item):
            return "must be finite"
        if "at_least" in limits and item < limits["at_least"]:
            return f"must be at least {limits['at_least']}"
        if "above" in limits and item <= limits["above"]:
            return f"must be above {limits['above']}"
        if "at_most" in limits and item > limits["at_most"]:
            return f"must be at most {limits['at_most']}"
        if "below" in limits and item >= limits["below"]:
            return f"must be below {limits['below']}"
        return None

    def _scalar(self, text: str, label: str) -> Any:
        word = text.strip()
        if self.type is bool and word.lower() in _BOOLEANS:
            return _BOOLEANS[word.lower()]
        if self.type is int and re.fullmatch(r"[+-]?[0-9]{1,40}", word):
            return int(word)
        if self.type is float and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", word):
            return float(word)
        if self.type is str:
            return text
        raise UserError(f"{label} {text!r}: must be {self._kind()}")

    def _kind(self) -> str:
        return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[self.type]


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@functools.cache
def flags_of(section: type) -> tuple[Flag, ...]:
    """The flags of one section dataclass, in the order of its fields."""
    hints = typing.get_type_hints(section)
    return tuple(_flag_of(one, hints[one.name]) for one in fields(section))


def _flag_of(one: Any, hint: Any) -> Flag:
    optional = isinstance(hint, types.UnionType)
    if optional:
        (hint,) = (arm for arm in typing.get_args(hint) if arm is not type(None))
    many = typing.get_origin(hint) is tuple
    limits = dict(one.metadata)
    return Flag(
        one.name,
        typing.get_args(hint)[0] if many else hint,
        many,
        optional,
        one.default,
        limits.pop("help"),
        limits,
    )


def _table(sections: Sequence[type]) -> dict[str, Flag]:
    return {entry.name: entry for section in sections for entry in flags_of(section)}


def _title(section: type) -> str:
    return section.__name__.removesuffix("Arguments")


def _first_paragraph(section: type) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return " ".join(_show(item) for item in value)
    return repr(value) if value is None or value == "" else str(value)


# -------------------------------------------------------------------------- reading flags and the YAML file


@dataclass(frozen=True)
class _Given:
    """A value that was given, and how to name it in an error: `--seed`, or `seed in run.yaml`."""

    value: Any
    label: str
    from_file: bool = False


def _read(argv: Sequence[str], table: Mapping[str, Flag], elsewhere: Mapping[str, str]) -> dict[str, _Given]:
    """All values that were given, the command line's before the YAML file's."""
    config, flags = _read_command_line(argv, table, elsewhere)
    if config is None:
        return flags
    from_file = _read_yaml(config, table, elsewhere)
    precision = {"dtype", "fp16", "bf16"}
    if precision & flags.keys():  # three names of one choice: the command line's is the one that holds
        from_file = {name: one for name, one in from_file.items() if name not in precision}
    return {**from_file, **flags}


def _read_command_line(
    argv: Sequence[str], table: Mapping[str, Flag], elsewhere: Mapping[str, str]
) -> tuple[str | None, dict[str, _Given]]:
    """(path of the YAML file or None, values by name)."""
    words = list(argv)
    config = words.pop(0) if words and words[0].endswith((".yaml", ".yml")) and words[0][0] != "-" else None
    given: dict[str, _Given] = {}
    while words:
        word = words.pop(0)
        if not re.match(r"--?[A-Za-z]", word):
            raise UserError(f"unexpected argument {word!r}: flags start with -- and a value with blanks needs quotes")
        spelling, equals, attached = word.partition("=")
        name = spelling.lstrip("-").replace("-", "_")
        values = [attached] if equals else []
        entry = table.get(name)
        takes = len(words) if entry is not None and entry.many else 1
        while not equals and words and not words[0].startswith("--") and len(values) < takes:
            values.append(words.pop(0))
        label = f"--{name}"
        if name == "config":
            if config is not None or len(values) != 1:
                raise UserError("--config takes one YAML file, given once")
            config = values[0]
            continue
        if entry is None or not spelling.startswith("--"):
            raise UserError(_unknown(f"flag {spelling}", name, [*table, "config"], elsewhere))
        if not values and entry.type is bool:
            values = ["true"]
        if not values:
            raise UserError(f"{label} needs a value, {entry._kind()} (one that starts with -- as {label}=VALUE)")
        value = entry.from_text(values, label)
        if name in given and given[name].value != value:
            raise UserError(f"{label} is given twice, {_show(given[name].value)} and {_show(value)}: keep one")
        given[name] = _Given(value, label)
    return config, given


def _read_yaml(path: str, table: Mapping[str, Flag], elsewhere: Mapping[str, str]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for name, value in _load_yaml(path):
        if name not in table:
            raise UserError(f"{path}: {_unknown(f'key {name}', str(name), table, elsewhere)}")
        if name in given:
            raise UserError(f"{path}: the key {name} is there twice: keep one")
        label = f"{name} in {path}"
        if value is None and not table[name].optional:
            raise UserError(f"{label} has no value: give {table[name]._kind()}, or take the key out")
        read = None if value is None else table[name].from_yaml(value, label)
        given[name] = _Given(read, label, from_file=True)
    return {name: one for name, one in given.items() if one.value is not None}


def _load_yaml(path: str) -> list[tuple[Any, Any]]:
    """(key, value) pairs of the file's top level, doubles included: a dict would lose them."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a YAML file: byte {error.start} is not UTF-8; save it as UTF-8") from error
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        pairs = [tuple(loader.construct_object(one, deep=True) for one in pair) for pair in pairs]
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{path}{where}: not valid YAML ({problem}); write one `name: value` a line") from error
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path} holds a {node.id}, not flags: write one `name: value` a line")
    return pairs


def _unknown(what: str, name: str, known: Iterable[str], elsewhere: Mapping[str, str]) -> str:
    if name in elsewhere:
        return f"{what} belongs to {elsewhere[name]}: leave it out here"
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"unknown {what}: {f'the nearest known one is {nearest[0]} (' if nearest else '('}--help lists all)"


# ---------------------------------------------------------------------------------- from values to sections


def _without_idle(given: Mapping[str, _Given], table: Mapping[str, Flag], rules: Sequence[_Idle]) -> dict[str, _Given]:
    """UserError for a flag that was given and has no effect.

    But a flag on the command line may switch off what depends on it in the file (`run.yaml --save false`):
    that is then left out.
    """
    values = {name: given[name].value if name in given else entry.default for name, entry in table.items()}
    kept = dict(given)
    for rule in rules:
        if rule.flag not in given or not rule.when(values):
            continue
        one, because = given[rule.flag], given.get(rule.because)
        if one.from_file and because is not None and not because.from_file:
            del kept[rule.flag]
        elif one.value is not False:
            raise UserError(_no_effect(rule.flag, one.value, values, one.label))
    return kept


def _require(given: Mapping[str, _Given], table: Mapping[str, Flag]) -> None:
    missing = [entry for entry in table.values() if entry.required and entry.name not in given]
    if missing:
        names = " and ".join(f"--{entry.name}" for entry in missing)
        raise UserError(f"{names} must be given: " + "; ".join(f"{one.name}, {one.help}" for one in missing))


def _sections(given: Mapping[str, _Given], sections: Sequence[type]) -> list[Any]:
    """The sections, without that of compatibility, which is checked and folded into `dtype`."""
    values = {name: one.value for name, one in given.items()}
    made = {
        section: {entry.name: values[entry.name] for entry in flags_of(section) if entry.name in values}
        for section in sections
    }
    compatibility = CompatibilityArguments(**made.pop(CompatibilityArguments))
    made[ModelArguments]["dtype"] = _dtype(values.get("dtype"), compatibility)
    return [section(**arguments) for section, arguments in made.items()]


def _dtype(dtype: str | None, compatibility: CompatibilityArguments) -> str:
    """One dtype from dtype (None: not given), fp16 and bf16. UserError where they contradict each other."""
    for name, is_dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        said = getattr(compatibility, name)
        if said is not None and dtype is not None and (dtype != is_dtype if said else dtype == is_dtype):
            raise UserError(f"{name} {_show(said)} and dtype {dtype} contradict each other: leave out one of them")
    if compatibility.fp16:
        return "float16"
    if compatibility.bf16:
        return "bfloat16"
    if compatibility.bf16 is False and dtype in (None, "auto"):
        return "float32"
    return dtype or "auto"
