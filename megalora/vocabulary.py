"""New tokens of an adapter: which they are, the model with rows for them, and what of these rows is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megalora.adapters.config import LoraConfig
from megalora.adapters.words import saved_modules, trained_tokens
from megalora.added_tokens import AddedToken, added_tokens_of
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.checkpoint.run.folder import tokenizer_folder
from megalora.data.tokenizer import load_tokenizer, tokens_beyond
from megalora.errors import UserError
from megalora.models.spec import Head, ModelSpec
from megalora.tokenizer_files import has_tokenizer

_PADDING = 1024  # rows without tokens that others put at the end, so that many ranks can share the vocabulary


def adapter_tokens(checkpoint: AdapterCheckpoint, base: str | Path) -> tuple[AddedToken, ...]:
    """Return the tokens that an adapter's tokenizer has beyond the one of its base model's folder.

    A run's checkpoint says which; of any other adapter, the tokenizer that lies with it. Raises UserError.
    """
    recorded = (checkpoint.trainer or {}).get("added_tokens")
    if recorded is not None:
        return added_tokens_of(recorded, checkpoint.where)
    if checkpoint.trainer is not None:
        return ()
    where = Path(checkpoint.where)
    places = (where, tokenizer_folder(where.parent.parent))
    found = next((place for place in places if has_tokenizer(place)), None)
    return () if found is None else tokens_beyond(found, base)


def with_rows_for(
    config: ModelSpec, added: Sequence[AddedToken], base: str | Path, tensors: Mapping[str, torch.Tensor] | None = None
) -> ModelSpec:
    """Return the model with a row for each added token, or with the rows of the matrices that an adapter brings.

    base     the model's folder, for its tokenizer
    tensors  the whole adapter by name, None for a new one. Matrices of fewer rows than there are tokens, or of many
             more, are another model's: the model is returned as for a new adapter
    """
    needed = 1 + max((token.id for token in added), default=-1)
    names = [config.embedding.weight, *((config.head.weight,) if isinstance(config.head, Head) else ())]
    rows = next((len(tensors[name]) for name in names if name in tensors), None) if tensors else None
    if rows is not None and rows != config.vocab_size and has_tokenizer(base):
        words = max(needed, 1 + max(load_tokenizer(base).get_vocab().values()))
        if words <= rows < words + _PADDING:
            return config.with_words(rows)
    return config.with_words(needed) if needed > config.vocab_size else config


def train_rows_of(lora_config: LoraConfig, config: ModelSpec, added: Sequence[AddedToken]) -> LoraConfig:
    """Return the LoraConfig that trains the rows of added tokens too: in trainable_token_indices, of both ends.

    Modules that are trained in full have them already. Raises UserError where only one end would be trained in full,
    or a LoRA beside an end.
    """
    if not added:
        return lora_config
    head = config.head
    ends = [config.embedding.name] if not isinstance(head, Head) else [head.name, config.embedding.name]
    saved = saved_modules(lora_config.modules_to_save, ends)
    if saved and len(saved) < len(ends):
        left = min(set(ends) - saved).rpartition(".")[2]
        raise UserError(
            f"lora_config: new tokens have rows in {' and '.join(e.rpartition('.')[2] for e in reversed(ends))}, but "
            f"modules_to_save lacks {left}",
            "name both, or neither to train only the rows of the new tokens",
        )
    if saved:
        return lora_config
    given = trained_tokens(lora_config.trainable_token_indices, ends, config.vocab_size)
    tied = isinstance(head, Head) and head.tied and head.name not in given
    of_ends = [config.embedding.name] if tied else ends
    new = [token.id for token in added]
    rows = {end: tuple(dict.fromkeys((*given.get(end, ()), *new))) for end in of_ends}
    if len(rows) == 1:
        return replace(lora_config, trainable_token_indices=next(iter(rows.values())))
    return replace(lora_config, trainable_token_indices={end.rpartition(".")[2]: ids for end, ids in rows.items()})
