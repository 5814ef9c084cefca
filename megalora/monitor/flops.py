"""FLOPs of LoRA training, for TFLOP/s: 4N, not 6N, because the frozen base has no weight gradient.

A token costs
    4 * frozen parameters in matrix products   2 forward, 2 gradient of the input (no weight gradient)
  + 6 * LoRA parameters                        2 forward, 2 gradient of the input, 2 of the weight
  + 3.5 * attention forward                    1 forward, 2.5 backward: five products for the forward's two
where attention forward = layers * 4 * heads * head_dim * context: two products (QK and PV) of 2 FLOPs per
multiply-add over the `context` keys that a token sees on average. The embedding is a look-up and free; the
output head counts, tied or not. These are the FLOPs that the model needs: recompute adds work but not to this
count.
"""

from __future__ import annotations

from collections.abc import Iterable


def lora_flops_per_token(
    *,
    frozen_matmul_parameters: float,
    lora_parameters: float,
    num_hidden_layers: int,
    num_attention_heads: int,
    head_dim: int,
    context: float,
) -> float:
    """Return the FLOPs of one trained token, forward and backward, for the whole model (not one rank).

    frozen_matmul_parameters: weights of all frozen linears and of the output head, without the embedding,
    norms, biases. context: keys that a token attends to on average, see `causal_context`.
    """
    attention = num_hidden_layers * 4 * num_attention_heads * head_dim * context
    return 4 * frozen_matmul_parameters + 6 * lora_parameters + 3.5 * attention


def causal_context(document_lengths: Iterable[int]) -> float:
    """Return keys that a token attends to on average in documents of these lengths: token i of a document sees i.

    One document of L tokens: (L + 1) / 2. No documents: 0.
    """
    lengths = list(document_lengths)
    seen = sum(length * (length + 1) // 2 for length in lengths)
    return seen / max(sum(lengths), 1)
