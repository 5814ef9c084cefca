"""FLOPs of LoRA training, for TFLOP/s: 4N, not 6N, because the frozen base has no weight gradient.

A token costs
    4 * frozen parameters in matrix products   2 forward, 2 gradient of the input (no weight gradient)
  + 6 * LoRA parameters                        2 forward, 2 gradient of the input, 2 of the weight
  + 3.5 * attention forward                    1 forward, 2.5 backward: five products for the forward's two
  + 3 * recurrence forward                     1 forward, 2 backward, of layers that keep a state
where attention forward = layers * 4 * heads * head_dim * context: two products (QK and PV) of 2 FLOPs per
multiply-add over the `context` keys that a token sees on average. The embedding is a look-up and free; the
output head counts, tied or not. These are the FLOPs that the model needs: recompute adds work but not to this
count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def lora_flops_per_token(
    *,
    frozen_matmul_parameters: float,
    lora_parameters: float,
    num_hidden_layers: int,
    num_attention_heads: int,
    head_dim: int,
    context: float,
    recurrence: float = 0.0,
) -> float:
    """Return the FLOPs of one trained token, forward and backward, for the whole model (not one rank).

    frozen_matmul_parameters: weights of all frozen linears and of the output head, without the embedding,
    norms, biases. context: keys that a token attends to on average, see `keys_seen`. recurrence: FLOPs of a forward
    step of the states of all layers.
    """
    attention = num_hidden_layers * 4 * num_attention_heads * head_dim * context
    return 4 * frozen_matmul_parameters + 6 * lora_parameters + 3.5 * attention + 3 * recurrence


def keys_seen(
    document_lengths: Sequence[int] | np.ndarray,
    window: int | None = None,
    chunk: int | None = None,
    causal: bool = True,
) -> float:
    """Return keys that a token attends to on average in documents of these lengths: token i of a document sees i, or
    `window` of them, or those of its chunk; where attention is not causal, as many behind it too.

    One document of L tokens: (L + 1) / 2, or L where it is not causal. No documents: 0.
    """
    lengths = np.asarray(document_lengths, dtype=np.int64)
    tokens = int(lengths.sum())
    if chunk is not None:
        chunks, rest = np.divmod(lengths, chunk)
        pairs = int((chunks * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2).sum())
    else:
        first = lengths if window is None else np.minimum(lengths, window)  # these see all that is before them
        pairs = int((first * (first + 1) // 2 + (lengths - first) * first).sum())
    if not causal:
        pairs = 2 * pairs - tokens
    return pairs / max(tokens, 1)
