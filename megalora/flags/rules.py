"""Flags that have no effect because of the value of another: giving one is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megalora.errors import UserError
from megalora.flags.flag import show
from megalora.learning_rate import WITH_LEAST
from megalora.pipeline.schedule import SCHEDULES


@dataclass(frozen=True)
class Rule:
    """`flag` has no effect because of the value of `because`, when `when(values of all flags)`."""

    flag: str
    because: str
    when: Callable[[Mapping[str, Any]], bool]
    remedy: str


def _without_evaluation(name: str) -> Callable[[Mapping[str, Any]], bool]:
    def idle(v: Mapping[str, Any]) -> bool:
        replies = name == "eval_steps" and v["sample_prompts"] is not None
        return bool(v[name]) and v["eval_data_path"] is None and v["eval_fraction"] is None and not replies

    return idle


def _without_steps(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda v: bool(v[name]) and v["eval_steps"] is None


_CUSTOM = Rule(
    "custom_partition",
    "partition_method",
    lambda v: v["partition_method"] != "custom",
    "set partition_method to custom",
)
FINETUNE_RULES = (
    _CUSTOM,
    Rule(
        "virtual_pipeline_size",
        "schedule",
        lambda v: v["virtual_pipeline_size"] > 1 and not SCHEDULES[v["schedule"]].chunked,
        "set schedule to interleaved_1f1b",
    ),
    Rule(
        "sequence_parallel",
        "tensor_parallel_size",
        lambda v: v["sequence_parallel"] and v["tensor_parallel_size"] == 1,
        "set tensor_parallel_size to 2 or more",
    ),
    Rule(
        "min_lr_rate",
        "lr_scheduler_type",
        lambda v: v["lr_scheduler_type"] not in WITH_LEAST,
        f"set lr_scheduler_type to {', '.join(WITH_LEAST[:-1])} or {WITH_LEAST[-1]}",
    ),
    Rule(
        "lr_decay_ratio",
        "lr_scheduler_type",
        lambda v: v["lr_scheduler_type"] != "warmup_stable_decay",
        "set lr_scheduler_type to warmup_stable_decay",
    ),
    Rule(
        "lr_power",
        "lr_scheduler_type",
        lambda v: v["lr_scheduler_type"] != "polynomial",
        "set lr_scheduler_type to polynomial",
    ),
    Rule(
        "recompute_layers",
        "recompute",
        lambda v: v["recompute_layers"] is not None and v["recompute"] != "full",
        "set recompute to full",
    ),
    Rule(
        "memory",
        "recompute",
        lambda v: v["memory"] is not None and v["recompute"] != "auto",
        "set recompute to auto",
    ),
    Rule(
        "offload_activations",
        "recompute",
        lambda v: v["offload_activations"] and v["recompute"] in ("none", "selective"),
        "set recompute to auto or full",
    ),
    Rule("save_steps", "save", lambda v: not v["save"], "set save to true"),
    Rule("save_total_limit", "save", lambda v: not v["save"], "set save to true"),
    Rule("sample_max_new_tokens", "sample_prompts", lambda v: v["sample_prompts"] is None, "give sample_prompts"),
    Rule("logging_first_step", "logging_steps", lambda v: v["logging_steps"] == 1, "set logging_steps above 1"),
    Rule("push_to_hub", "save", lambda v: v["push_to_hub"] is not None and not v["save"], "set save to true"),
    Rule("profile_steps", "profile", lambda v: not v["profile"], "set profile to true"),
    Rule("profile_file", "partition_method", lambda v: v["partition_method"] != "cost", "set partition_method to cost"),
    Rule("keep_best", "save", lambda v: v["keep_best"] and not v["save"], "set save to true"),
    *(
        Rule(
            name,
            "eval_data_path",
            _without_evaluation(name),
            "give eval_data_path or eval_fraction",
        )
        for name in ("eval_steps", "eval_generate", "early_stopping_patience", "keep_best")
    ),
    *(
        Rule(
            name,
            "eval_steps",
            _without_steps(name),
            "give eval_steps: without it only one evaluation is made, at the end",
        )
        for name in ("early_stopping_patience", "keep_best")
    ),
)
GENERATE_RULES = (
    _CUSTOM,
    Rule("top_k", "temperature", lambda v: v["temperature"] == 0, "set temperature above 0"),
    Rule("top_p", "temperature", lambda v: v["temperature"] == 0, "set temperature above 0"),
    Rule("min_p", "temperature", lambda v: v["temperature"] == 0, "set temperature above 0"),
    Rule("logits_dir", "return_logits", lambda v: not v["return_logits"], "set return_logits to true"),
    Rule(
        "compare_base",
        "resume_peft_from_checkpoint",
        lambda v: v["compare_base"] and v["resume_peft_from_checkpoint"] is None,
        "give resume_peft_from_checkpoint",
    ),
    Rule(
        "output_file",
        "prompt",
        lambda v: v["prompt"] is None and v["prompts_file"] is None and v["image"] is None,
        "give prompt or prompts_file",
    ),
    Rule(
        "disable_adapter",
        "resume_peft_from_checkpoint",
        lambda v: v["disable_adapter"] and v["resume_peft_from_checkpoint"] is None,
        "give resume_peft_from_checkpoint",
    ),
)
CONVERT_RULES = (_CUSTOM,)


def no_effect(name: str, value: Any, values: Mapping[str, Any], label: str | None = None) -> UserError:
    """Return the error for flag `name`, which was given as `value`; `values` are those of all flags."""
    rules = (rule for rule in (*FINETUNE_RULES, *GENERATE_RULES) if rule.flag == name)
    rule = next(rule for rule in rules if rule.because in values and rule.when(values))
    reason = values[rule.because]
    cause = f"without {rule.because}" if reason is None else f"with {rule.because} {show(reason)}"
    return UserError(f"{label or name} {show(value)} has no effect {cause}", f"{rule.remedy}, or leave {name} out")
