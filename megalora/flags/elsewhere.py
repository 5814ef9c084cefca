"""What to write here for flags of LLaMA-Factory, the HF Trainer, TRL and PEFT's examples.

docs/flags-elsewhere.md has more."""

from __future__ import annotations

from collections.abc import Iterable

LORA = {  # fields of lora_config, with a value, and what others call them
    "r": ("16", "lora_r lora_rank lora_dim rank r"),
    "lora_alpha": ("32", "lora_alpha alpha"),
    "lora_dropout": ("0.05", "lora_dropout"),
    "target_modules": ('"all-linear"', "lora_target lora_target_modules target_modules"),
    "modules_to_save": ('["embed_tokens"]', "additional_target lora_modules_to_save modules_to_save"),
    "use_rslora": ("true", "use_rslora"),
    "use_dora": ("true", "use_dora"),
}
FLAGS = {  # ours, and what others call them
    "model_path": "model model_name model_name_or_path pretrained_model_name_or_path base_model",
    "resume_peft_from_checkpoint": "adapter adapter_name_or_path adapter_path lora_path",
    "data_path": "data dataset dataset_name dataset_dir train_file train_data",
    "eval_data_path": "eval_dataset eval_file validation_file",
    "eval_fraction": "val_size validation_split_percentage",
    "eval_steps": "eval_strategy evaluation_strategy do_eval",
    "seq_length": "cutoff_len max_length max_seq_length max_seq_len model_max_length block_size",
    "max_rows": "max_samples max_train_samples",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
    "learning_rate": "lr",
    "num_train_epochs": "epochs num_epochs n_epochs",
    "base_format": "quantization_bit quantization load_in_4bit load_in_8bit",
    "recompute": "gradient_checkpointing disable_gradient_checkpointing activation_checkpointing",
    "optimizer": "optim",
    "keep_best": "load_best_model_at_end",
    "nproc": "nproc_per_node num_processes num_gpus gpus",
    "layout": "deepspeed fsdp",
    "train_on": "train_on_prompt mask_history assistant_only_loss completion_only_loss",
    "packing": "neat_packing",
    "data_cache": "tokenized_path overwrite_cache",
    "dtype": "torch_dtype precision mixed_precision",
    "max_new_tokens": "max_tokens",
}
NEEDLESS = {  # names of flags that need not be given, and why
    "resume resume_training continue_training auto_resume": "the same command again goes on from the newest checkpoint "
    "in its output_dir; --help lists all flags",
}


def advice(name: str, known: Iterable[str]) -> str | None:
    """Return what to do with a flag that another program has, where one of those that are known takes its place."""
    known = set(known)
    for field, (value, names) in LORA.items():
        if name in names.split() and "lora_config" in known:
            return (
                f"""{field} is a field of lora_config, a file or the fields: --lora_config '{{"{field}": {value}}}'"""
            )
    for names, why in NEEDLESS.items():
        if name in names.split() and "output_dir" in known:
            return f"leave it out: {why}"
    ours = next((ours for ours, names in FLAGS.items() if name in names.split() and ours in known), None)
    return None if ours is None else f"here it is --{ours}; --help lists all flags"
