"""What is trained of the embedding or of the head: the whole matrix, rows of some tokens, or a LoRA beside it.

modules_to_save, trainable_token_indices and target_modules of PEFT's LoraConfig, met with a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalora.adapters.lora import Adapter
from megalora.errors import UserError

TOKENS = "token_adapter.trainable_tokens_delta"  # peft's name of the rows that are trained
Tokens = tuple[int, ...] | Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class WordsAdapter:
    """Of the embedding or the head.

    whole   the matrix itself is trained
    tokens  ids of the tokens whose rows are trained
    lora    the branch beside the matrix
    """

    whole: bool = False
    tokens: tuple[int, ...] = ()
    lora: Adapter | None = None

    @property
    def trains(self) -> bool:
        return self.whole or bool(self.tokens) or self.lora is not None

    def check_stages(self, tied: bool, stages: int) -> None:
        """Raise UserError where rows of the embedding are the tied head's too, and that lies on another stage."""
        if tied and self.tokens and stages > 1:
            raise UserError(
                f"pipeline_parallel_size ({stages}): the trained rows of tokens are the tied head's too, which lies on "
                "another stage",
                "use --pipeline_parallel_size 1, or modules_to_save instead of trainable_token_indices",
            )

    def shapes(self, name: str, is_head: bool, vocab_size: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the whole shape of each trained parameter by its name; name: of the module."""
        found: dict[str, tuple[int, ...]] = {}
        if self.whole:
            found[f"{name}.weight"] = (vocab_size, width)
        if self.tokens:
            found[f"{name}.{TOKENS}"] = (len(self.tokens), width)
        if self.lora is not None and is_head:
            found |= {f"{name}.lora_A.weight": (self.lora.r, width), f"{name}.lora_B.weight": (vocab_size, self.lora.r)}
        elif self.lora is not None:
            found |= {f"{name}.lora_embedding_A": (self.lora.r, vocab_size)}
            found |= {f"{name}.lora_embedding_B": (width, self.lora.r)}
        return found


def checked_tokens(value: object, where: str) -> Tokens | None:
    """Return trainable_token_indices as LoraConfig takes it: ids, or ids by module name. Raises UserError."""

    def ids(indices: object) -> tuple[int, ...]:
        good = isinstance(indices, (list, tuple)) and all(
            isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in indices
        )
        if not isinstance(indices, (list, tuple)) or not good or len(set(indices)) != len(indices):
            raise UserError(
                f"{where}: trainable_token_indices = {value!r} is not valid",
                "give a list of different token ids, or an object of such lists by module name",
            )
        return tuple(indices)

    if value is None or value == [] or value == {}:
        return None
    return {str(name): ids(some) for name, some in value.items()} if isinstance(value, Mapping) else ids(value)


def saved_modules(names: Sequence[str] | None, ends: Sequence[str]) -> frozenset[str]:
    """Return which of `ends` (full names) modules_to_save names. Raises UserError for any other module."""
    found = set()
    for name in names or ():
        matches = [end for end in ends if end == name or end.endswith(f".{name}")]
        if not matches:
            short = ", ".join(end.rpartition(".")[2] for end in ends)
            raise UserError(
                f"lora_config: modules_to_save names {name!r}: only {short} of this model can be trained in full",
                f"name these, or adapt {name!r} with target_modules",
            )
        found.update(matches)
    return frozenset(found)


def trained_tokens(given: Tokens | None, ends: Sequence[str], vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the trained token ids by full module name; a list is of the embedding, the last of `ends`.

    Raises UserError for a module that has no tokens, and an id that the model has no row for.
    """
    if given is None:
        return {}
    by_name = given if isinstance(given, Mapping) else {ends[-1]: given}
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in by_name.items():
        matches = [end for end in ends if end == name or re.fullmatch(rf"(.*\.)?{re.escape(name)}", end)]
        if not matches:
            short = ", ".join(end.rpartition(".")[2] for end in ends)
            raise UserError(
                f"lora_config: trainable_token_indices names {name!r}, which has no tokens", f"name {short}"
            )
        if ids and max(ids) >= vocab_size:
            raise UserError(
                f"lora_config: trainable_token_indices names token {max(ids)}, but the model's vocab_size is "
                f"{vocab_size}",
                "correct the index, or add tokens with --new_special_tokens",
            )
        found |= dict.fromkeys(matches, ids)
    return {name: ids for name, ids in found.items() if ids}
