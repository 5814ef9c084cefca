"""Granite with sliding windows: Granite whose layers have sinks, and windows and rotations of their own."""

import dataclasses
from collections.abc import Callable

from megalora.models.families.granite import FAMILY as GRANITE
from megalora.models.families.granite import attention_of, decoder_of
from megalora.models.family import Fields
from megalora.models.parts import gated_mlp, head_dim, layer_windows
from megalora.models.spec import Attention, ModelSpec

FIELDS = frozenset({"sliding_window", "layer_types", "layer_rope_theta"})


def sliding_attention(hf: Fields) -> Callable[[int], Attention]:
    """Return the attention of each layer, by `layer_types` and `layer_rope_theta`, where 0 is no rotation."""
    windows, thetas = layer_windows(hf), hf.layer_rope_theta
    if len(thetas) != hf.num_hidden_layers:
        hf.fail(f"layer_rope_theta has {len(thetas)} entries for {hf.num_hidden_layers} layers", "correct it")

    def attention(index: int) -> Attention:
        made = attention_of(hf, window=windows[index], rotates=False, sinks="self_attn.sinks")
        turns = thetas[index] > 0
        return dataclasses.replace(made, position=hf.rotary(head_dim(hf), theta=thetas[index])) if turns else made

    return attention


def read(hf: Fields) -> ModelSpec:
    return decoder_of(hf, gated_mlp(hf, hf.mlp_bias), 1 / hf.logits_scaling, attention=sliding_attention(hf))


FAMILY = dataclasses.replace(GRANITE, types=("granite_swa",), read=read, reads=GRANITE.reads | FIELDS, published=())
