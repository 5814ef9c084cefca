"""What servers read of a PEFT folder, beside the peft library: vLLM and SGLang.

By their source as known when this was written (2026): both take one scale for all modules, lora_alpha / r, and the
keys lora_A.weight and lora_B.weight of linears in the layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

LARGEST_RANK = 512  # of vLLM's max_lora_rank
USUAL_RANK = 16  # its default
_UNREAD = (
    *("bias", "lora_bias", "use_dora", "modules_to_save", "trainable_token_indices"),
    *("rank_pattern", "alpha_pattern"),
)


def engines_caution(lora_config: Mapping[str, Any], modules: Collection[str]) -> str | None:
    """Return a line on what vLLM and SGLang may refuse or pass over in an adapter, or on the flag that its rank needs.

    None where nothing is known to hinder. lora_config: fields of LoraConfig.to_dict(); modules: that have factors
    """
    found = [name for name in _UNREAD if lora_config.get(name) not in (None, False, "none", {}, [], ())]
    of_no_layer = (name for name in modules if not any(part.isdigit() for part in name.split(".")))
    found += sorted({name.rpartition(".")[2] for name in of_no_layer})
    found += ["a regular expression as target_modules"] if _is_expression(lora_config) else []
    rank = lora_config["r"]
    if found or rank > LARGEST_RANK:
        what = ", ".join([*found, *([f"r = {rank}"] if rank > LARGEST_RANK else [])])
        return (
            f"vLLM and SGLang may refuse this adapter, or compute it without {what}: to serve it there, put it into "
            f"the weights (megalora convert adapter merge)"
        )
    if rank > USUAL_RANK:
        return f"vLLM takes this adapter with --max-lora-rank {_step(rank)} or more"
    return None


def _is_expression(lora_config: Mapping[str, Any]) -> bool:
    targets = lora_config.get("target_modules")
    return isinstance(targets, str) and targets != "all-linear"  # which is exported as names


def _step(rank: int) -> int:
    """Return the least of vLLM's sizes that holds a rank."""
    return next(size for size in (32, 64, 128, 256, 320, LARGEST_RANK) if size >= rank)
