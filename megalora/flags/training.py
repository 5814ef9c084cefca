"""Sections of `megalora finetune`: model, data, training, and the reference launch's spellings."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from megalora.choices import OPTIMIZERS, TRACKERS
from megalora.errors import UserError
from megalora.flags import shared
from megalora.flags.flag import REQUIRED, Section, flag, flags_of, show
from megalora.learning_rate import SCHEDULES as LEARNING_RATES
from megalora.learning_rate import Shape, learning_rate_factor

_NAMED = re.compile(r"(?:([A-Za-z0-9][\w-]{0,49})=)?(.*)", re.DOTALL)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_NOT_NAMES = frozenset("step loss perplexity accuracy precision recall f1 macro_f1 rouge_l".split())


@dataclass(frozen=True)
class ModelArguments(Section):
    """The model, its weights and its precision."""

    model_path: str = flag(
        REQUIRED,
        "Hugging Face folder of the model: config.json, tokenizer, weights; or OWNER/NAME on its hub",
        exists="a Hugging Face folder with config.json, tokenizer and weights",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "folder to load the base weights from: Hugging Face safetensors or megalora shards",
        unset="model_path",
        exists="a Hugging Face folder or megalora shards",
    )
    resume_peft_from_checkpoint: str | None = flag(
        None,
        "adapter to load: output_dir of a run, megalora shards or a PEFT folder",
        unset="a new adapter; in generation, no adapter",
    )
    lora_config: str | None = shared.LORA_CONFIG.field(None, unset="chosen by model_type")
    base_format: str = shared.BASE_FORMAT.field("auto")
    dtype: str = shared.DTYPE.field("auto")


@dataclass(frozen=True)
class DataArguments(Section):
    """Training data, and how it becomes tokens."""

    data_path: str = flag(
        REQUIRED,
        "training data: files, folders or datasets separated by commas, each with an optional :WEIGHT "
        "(json, jsonl, csv, tsv, parquet, arrow; also .gz, .zst)",
    )
    eval_data_path: tuple[str, ...] | None = flag(
        None,
        "evaluation data, in the same formats; several sets as NAME=DATA, each with a loss of its own",
        verbatim=True,
        unset="no evaluation",
    )
    eval_fraction: float | None = flag(
        None, "fraction of the training rows to hold out for evaluation", above=0, below=1, unset="none"
    )
    max_rows: int | None = flag(None, "read only the first rows of each file or dataset", at_least=1, unset="all")
    columns: tuple[str, ...] | None = flag(
        None,
        "names of the fields of your rows, as ours=yours: output=reply instruction=ask",
        verbatim=True,
        unset="ours",
    )
    ignore_columns: tuple[str, ...] | None = flag(
        None, "fields of the rows to ignore, besides those known to be harmless", verbatim=True, unset="none"
    )
    seq_length: int = shared.SEQ_LENGTH.field(1024)
    source_length: int | None = shared.SOURCE_LENGTH.field(None, unset="seq_length")
    source_prefix: str | None = shared.SOURCE_PREFIX.field(None, unset="none")
    packing: bool = flag(True, "pack several whole documents into one row; attention never crosses documents")
    template: str | None = shared.TEMPLATE.field(None, unset="the tokenizer's own")
    chat_template_kwargs: str | None = shared.CHAT_TEMPLATE_KWARGS.field(None, unset="the template's defaults")
    history_thinking: str = flag(
        "split",
        "for an earlier reply whose thinking the template drops: train it as a document of its own (split), do not "
        "train it (mask), or keep its thinking (keep)",
        choices=("split", "mask", "keep"),
    )
    special_tokens_in_text: bool = shared.SPECIAL_TOKENS_IN_TEXT.field(False)
    new_special_tokens: tuple[str, ...] | None = shared.NEW_SPECIAL_TOKENS.field(None, unset="none")
    train_on: str = flag(
        "all",
        "tokens to train on: all replies, the last reply of each row, or the prompts too",
        choices=("all", "last", "prompt"),
    )
    on_bad_row: str = flag(
        "error", "at rows that cannot be used: stop (error), or count them and go on (skip)", choices=("error", "skip")
    )
    on_long_row: str = flag(
        "error",
        "at a row longer than seq_length: count it as bad (error), leave it out, cut it, or split it at its turns",
        choices=("error", "skip", "truncate", "split"),
    )
    data_cache: str | None = flag(
        None, "folder for the tokens of the rows, which other runs read too", unset="~/.cache/megalora"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_fraction is not None and self.eval_data_path is not None:
            raise UserError("eval_fraction and eval_data_path both name evaluation rows", "give one of them")
        self._check_evaluations()
        for pair in self.columns or ():
            if not re.fullmatch(r"[^=]+=[^=]+", pair):
                raise UserError(f"columns {pair!r} is not ours=yours", "write it like output=reply")
        if len(self.renamed_columns) != len(self.columns or ()):
            raise UserError("columns names one of your fields twice", "keep one")
        shared.check_new_tokens(self.new_special_tokens)
        shared.template_variables(self.chat_template_kwargs)

    def _check_evaluations(self) -> None:
        names = [name for name, _ in self.evaluations]
        for name, data in self.evaluations:
            if len(names) > 1 and not name:
                raise UserError(f"eval_data_path {data} has no name", f"write each set as NAME=DATA: held={data}")
            if name in _NOT_NAMES or name.startswith("f1_"):
                raise UserError(f"eval_data_path names a set {name}, as a metric is named", "choose another name")
            if names.count(name) > 1:
                raise UserError(f"eval_data_path names two sets {name}", "give each a name of its own")

    @property
    def evaluations(self) -> tuple[tuple[str, str], ...]:
        """(name, data) of each evaluation set of eval_data_path; the name is "" where none is given.

        What is there by the whole word is no name: a file may be called part=1.json.
        """
        words = self.eval_data_path or ()
        found = ((word, _NAMED.fullmatch(word)) for word in words)
        named = {word: match for word, match in found if match and not Path(word.split(",")[0]).exists()}
        return tuple((named[word][1] or "", named[word][2]) if word in named else ("", word) for word in words)

    @property
    def source_tokens(self) -> int:
        """Tokens of a row of sources, where there are such."""
        return self.seq_length if self.source_length is None else self.source_length

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return shared.template_variables(self.chat_template_kwargs)

    @property
    def renamed_columns(self) -> dict[str, str]:
        """Our name of a field by the user's."""
        pairs = (pair.split("=") for pair in self.columns or ())
        return {yours.strip(): ours.strip() for ours, yours in pairs}


@dataclass(frozen=True)
class TrainArguments(Section):
    """Optimizer, length of the run, checkpoints and logs. A step is one optimizer step."""

    output_dir: str = flag(REQUIRED, "folder of the run: checkpoints, adapter, metrics.jsonl, TensorBoard, logs")
    overwrite_output_dir: bool = flag(False, "start a new run even if output_dir has checkpoints; they are removed")
    per_device_train_batch_size: int = shared.PER_DEVICE_TRAIN_BATCH_SIZE.field(1)
    max_tokens_per_microbatch: int | None = flag(
        None,
        "tokens in one microbatch of one data-parallel rank, at most: as many rows of seq_length as go into them",
        at_least=2,
        unset="per_device_train_batch_size rows",
    )
    gradient_accumulation_steps: int = shared.GRADIENT_ACCUMULATION_STEPS.field(1)
    global_batch_size: int | None = shared.GLOBAL_BATCH_SIZE.field(
        None,
        unset="per_device_train_batch_size * gradient_accumulation_steps of each data-parallel rank",
    )
    num_train_epochs: float | None = flag(
        None,
        "epochs to train for; with max_steps, the run ends at whichever comes first",
        above=0,
        unset="3.0, or no limit with max_steps",
    )
    max_steps: int | None = flag(None, "steps to train for", at_least=1, unset="set by num_train_epochs")
    learning_rate: float = flag(2e-4, "peak learning rate", at_least=0)
    lr_scheduler_type: str = flag("linear", "learning rate schedule after warmup", choices=tuple(LEARNING_RATES))
    warmup_steps: int = flag(0, "steps of linear warmup of the learning rate", at_least=0)
    warmup_ratio: float | None = flag(
        None, "warmup_steps as a fraction of the steps of the run", at_least=0, below=1, unset="set by warmup_steps"
    )
    min_lr_rate: float = flag(
        0.0, "last learning rate as a fraction of learning_rate, for the schedules that have one", at_least=0, at_most=1
    )
    lr_decay_ratio: float = flag(
        0.2,
        "for warmup_stable_decay: fraction of the steps after warmup over which the rate falls, in a line",
        above=0,
        at_most=1,
    )
    lr_power: float = flag(1.0, "for polynomial: exponent of the fraction of steps that are left", above=0)
    weight_decay: float = flag(0.0, "AdamW weight decay", at_least=0)
    adam_beta1: float = flag(0.9, "AdamW beta1", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "AdamW beta2", at_least=0, below=1)
    adam_epsilon: float = flag(1e-8, "AdamW epsilon", above=0)
    optimizer: str = flag("adamw", "adamw is torch's fused AdamW, apex is FusedAdam of NVIDIA Apex", choices=OPTIMIZERS)
    loraplus_lr_ratio: float = flag(
        1.0, "LoRA+: learning rate of lora_B, biases and DoRA magnitudes over that of lora_A", above=0
    )
    max_grad_norm: float = flag(1.0, "clip gradients to this global norm; 0 turns clipping off", at_least=0)
    seed: int = flag(42, "seed of adapter init, dropout and data order", at_least=0, at_most=2**63 - 1)
    base_dropout: bool | None = flag(
        None,
        "train with the base model's own dropout, beside lora_dropout: of embedding, residual and attention, as its "
        "config.json says",
        unset="true where config.json asks for any",
    )
    eval_steps: int | None = flag(None, "evaluate every this many steps", at_least=1, unset="only at the end")
    eval_generate: int = flag(
        0,
        "at each evaluation, write replies to this many rows of each evaluation set and score them (ROUGE-L); for "
        "SEQ_2_SEQ_LM",
        at_least=0,
    )
    sample_prompts: str | None = flag(
        None,
        "file of prompts, one a line or rows of json, whose replies are written to replies.jsonl in output_dir: at the "
        "start, at every evaluation and at the end, greedy; of a model that reads images rows with one each",
        exists="a file of prompts",
        unset="none",
    )
    sample_max_new_tokens: int = flag(
        128, "maximum length of a reply to sample_prompts, in tokens", at_least=1, at_most=2048
    )
    early_stopping_patience: int | None = flag(
        None,
        "stop after this many evaluations in a row without a lower loss",
        at_least=1,
        unset="train to the last step",
    )
    keep_best: bool = flag(
        False, "keep the checkpoint with the lowest evaluation loss, and export that one instead of the last"
    )
    save: bool = flag(True, "write checkpoints")
    save_steps: int = flag(500, "write a checkpoint every this many steps, and after the last step", at_least=1)
    save_total_limit: int | None = flag(None, "keep only this many of the newest checkpoints", at_least=1, unset="all")
    push_to_hub: str | None = flag(
        None,
        "OWNER/NAME of a repository of the Hugging Face hub to put the adapter in, at the end; a new one is private",
        unset="nowhere",
    )
    dry_run: bool = flag(
        False,
        "load the model and the rows, print the run's settings, memory and length, and stop before the first step; "
        "output_dir is left as it is",
    )
    logging_steps: int = flag(1, "log every this many steps", at_least=1)
    logging_first_step: bool = flag(False, "log the first step too")
    report_to: tuple[str, ...] | None = flag(
        None,
        "where metrics go besides metrics.jsonl; all but tensorboard are packages to install, which work offline too",
        choices=TRACKERS,
        unset="tensorboard",
    )
    cuda_graphs: bool | None = flag(
        None,
        "replay the layers as CUDA graphs: same numbers, less launch overhead",
        unset="true where possible: on GPUs, without pipeline stages, below 32,768 tokens a microbatch",
    )
    deterministic: bool = flag(
        False, "make runs on GPUs bit-for-bit reproducible; attention's backward pass becomes slower"
    )
    wall_clock_breakdown: bool = flag(False, "log seconds per phase: forward, backward, communication, ...")
    hang_timeout: float = flag(
        600.0, "stop the run if no rank makes progress for this many seconds, and report where each is; 0 is never",
        at_least=0,
    )  # fmt: skip
    log_dir: str | None = flag(None, "folder of the log files, one per rank", unset="logs in output_dir")
    profile: bool = flag(
        False, "record when each stage computes, as a Chrome trace and a drawing in output_dir/profile"
    )
    profile_steps: int = flag(2, "number of steps that profile records, starting with the second", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens_per_microbatch is not None and self.per_device_train_batch_size != 1:
            raise UserError(
                f"max_tokens_per_microbatch ({self.max_tokens_per_microbatch}) and per_device_train_batch_size "
                f"({self.per_device_train_batch_size}) both say how many rows a microbatch has",
                "give one of them",
            )
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise UserError(
                f"global_batch_size ({self.global_batch_size}) and gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}) both say how many rows a step has",
                "give one of them",
            )
        if self.warmup_ratio and self.warmup_steps:
            raise UserError("warmup_ratio and warmup_steps both say how long the warmup is", "give one of them")
        if self.push_to_hub is not None and not _REPOSITORY.fullmatch(self.push_to_hub):
            raise UserError(f"push_to_hub {self.push_to_hub} is no repository", "give OWNER/NAME")
        named = self.report_to or ()
        if "none" in named and len(named) > 1:
            raise UserError(f"report_to {show(named)} names none beside others", "give none alone, or the others")
        if self.max_steps is not None:
            self._check_warmup(self.max_steps)

    def in_rows(self, seq_length: int) -> TrainArguments:
        """Return these with the rows of a microbatch for max_tokens_per_microbatch, where that is given.

        UserError where it is less than one row of seq_length tokens.
        """
        if self.max_tokens_per_microbatch is None:
            return self
        rows = self.max_tokens_per_microbatch // seq_length
        if rows == 0:
            raise UserError(
                f"max_tokens_per_microbatch ({self.max_tokens_per_microbatch}) is less than one row of seq_length "
                f"({seq_length})",
                f"give at least {seq_length}, or a shorter seq_length",
            )
        return replace(self, per_device_train_batch_size=rows, max_tokens_per_microbatch=None)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps of the whole run, given those of one epoch (at least 1).

        The run ends at max_steps or after num_train_epochs (rounded up to a whole step), whichever is first;
        neither given is 3 epochs. UserError where the run would end within its warmup.
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

    def warmup(self, total_steps: int) -> int:
        """Return the steps of warmup in a run of `total_steps`: warmup_ratio is rounded up to a whole step, but the
        last step is none of them."""
        if not self.warmup_ratio:
            return self.warmup_steps
        return min(math.ceil(Fraction(str(self.warmup_ratio)) * total_steps), total_steps - 1)

    @property
    def learning_rate_shape(self) -> dict[str, float]:
        """What the schedule takes besides its name, where it is not the default."""
        values = {"min_lr_rate": self.min_lr_rate, "lr_decay_ratio": self.lr_decay_ratio, "lr_power": self.lr_power}
        defaults = {one.name: one.default for one in flags_of(TrainArguments)}
        return {name: value for name, value in values.items() if value != defaults[name]}

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Return the learning rate of a step, counted from 0, in a run of `total_steps`."""
        shape = Shape(self.min_lr_rate, self.lr_decay_ratio, self.lr_power)
        factor = learning_rate_factor(self.lr_scheduler_type, step, total_steps, self.warmup(total_steps), shape)
        return self.learning_rate * factor

    def _check_warmup(self, steps: int) -> None:
        if self.warmup_steps and self.warmup_steps >= steps:
            raise UserError(
                f"warmup_steps ({self.warmup_steps}) is not less than the steps of the run ({steps}), so the learning "
                f"rate would never reach learning_rate",
                "give fewer warmup_steps, or train for more steps",
            )


@dataclass(frozen=True)
class CompatibilityArguments(Section):
    """Flags of the reference launch that are spellings of a flag above, or have a single supported value.

    They end in the other sections (fp16 and bf16 in `dtype`) or in an error; no part of the package sees
    them.
    """

    fp16: bool | None = flag(None, "true is dtype float16", unset="set by dtype")
    bf16: bool | None = flag(
        None, "true is dtype bfloat16; false keeps dtype auto from choosing it", unset="set by dtype"
    )
    split_method: str = flag("layer_split", "only layer_split is supported: stages are cut between layers")
    input_names: tuple[str, ...] = flag(
        ("input_ids", "attention_mask"),
        "inputs of the model; must include input_ids",
        choices=("input_ids", "attention_mask", "labels", "position_ids"),
    )
    no_tie_modules: bool = flag(True, "only true is supported: a tied head is a frozen copy on the last stage")
    return_logits: bool = flag(False, "generation only (writes logits there); must be false in training")
    text_generation: bool | None = flag(
        None, "generation only, where it must be true: logits become text", unset="true in generation"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fp16 and self.bf16:
            raise UserError("fp16 and bf16 are both true", "give one of them")
        if self.split_method != "layer_split":
            raise UserError(
                f"split_method {self.split_method} is not supported: stages are cut between layers",
                "give layer_split, and choose where to cut by partition_method",
            )
        if "input_ids" not in self.input_names:
            raise UserError(
                f"input_names {show(self.input_names)} lacks input_ids, which every model here reads",
                "add input_ids, or leave input_names out",
            )
        if not self.no_tie_modules:
            raise UserError(
                "no_tie_modules false is not supported: the base is frozen, so a tied head is copied to the last stage",
                "give true, or leave no_tie_modules out",
            )

    def resolve_dtype(self, dtype: str | None) -> str:
        """Return one dtype from dtype (None: not given), fp16 and bf16. UserError where they contradict each other."""
        for name, is_dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
            said = getattr(self, name)
            if said is not None and dtype is not None and (dtype != is_dtype if said else dtype == is_dtype):
                raise UserError(f"{name} {show(said)} contradicts dtype {dtype}", "leave out one of them")
        if self.fp16:
            return "float16"
        if self.bf16:
            return "bfloat16"
        if self.bf16 is False and dtype in (None, "auto"):
            return "float32"
        return dtype or "auto"
