"""Which linears are adapted where lora_config.json names none."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from megalora.errors import UserError

# By model_type: the reference system's table, and peft's for what that lacks.
DEFAULT_TARGET_MODULES: Mapping[str, tuple[str, ...]] = {
    "t5": ("q", "v"),
    "mt5": ("q", "v"),
    "bart": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "opt": ("q_proj", "v_proj"),
    "gptj": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gpt_neo": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "xlm-roberta": ("query", "value"),
    "electra": ("query", "value"),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "layoutlm": ("query", "value"),
    "llama": ("q_proj", "v_proj"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "chatglm": ("query_key_value",),
    "gpt_bigcode": ("c_attn",),
    "mpt": ("Wqkv",),
    "RefinedWebModel": ("query_key_value",),
    "RefinedWeb": ("query_key_value",),
    "falcon": ("query_key_value",),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "mistral": ("q_proj", "v_proj"),
    "mixtral": ("q_proj", "v_proj"),
    "stablelm": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gemma3_text": ("q_proj", "v_proj"),
    **dict.fromkeys(
        ("gemma3", "gemma4", "llama4", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"), ("q_proj", "v_proj")
    ),  # of the language model alone
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
}


def check_stacks(matched: Collection[str], stacks: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError where `matched` has some linears of a tensor that holds those of all experts, and not the others.

    A checkpoint names the tensor (target_parameters), and would be read as one with adapters of all.
    """
    for stack, parts in stacks.items():
        found = set(parts).intersection(matched)
        if 0 < len(found) < len(parts):
            raise UserError(
                f"lora_config: target_modules means {min(found)}, but not all {len(parts)} experts of this layer: "
                "that is not implemented where a model holds their weights in one tensor",
                f"name {stack.rpartition('.')[2]}, for all experts",
            )
