"""Bamba (Bamba-9B): Mamba-2 in most layers, attention of which half a head rotates in the others."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, gated_mlp, grouped_attention, llama_ends, rms
from megalora.models.spec import Layer, Mixer, ModelSpec, Residual
from megalora.models.state_spaces import MAMBA_FIELDS, MAMBA_HARMLESS, layer_kinds, mamba


def read(hf: Fields) -> ModelSpec:
    indices, bias = hf.attn_layer_indices or (), bool(hf.attention_bias)
    said = ["full_attention" if i in indices else "linear_attention" for i in range(hf.num_hidden_layers)]
    kinds, attention = layer_kinds(hf, said), grouped_attention(hf, bias=bias, out_bias=bias)
    mixers: dict[str, Mixer] = {"full_attention": attention, "linear_attention": mamba(hf)}
    mlp = gated_mlp(hf, bool(hf.mlp_bias), at="feed_forward")
    share = hf.rope["partial_rotary_factor"]
    if share != 0.5:  # which transformers puts in its place, in silence
        hf.fail(f"partial_rotary_factor = {share!r} is not implemented", "remove it: half of each head rotates")

    def layer(index: int) -> Layer:
        mixer = mixers[kinds[index]]
        return (Residual(mixer, rms(hf, "input_layernorm")), Residual(mlp, rms(hf, "pre_ff_layernorm")))

    return llama_ends(hf, layer, rms(hf, "model.final_layernorm"))


FAMILY = Family(
    ("bamba",),
    read,
    reads=LLAMA_FIELDS | MAMBA_FIELDS | {"attn_layer_indices", "attention_bias", "mlp_bias"},
    fixed={"hidden_act": "silu", "attention_dropout": 0.0, "z_loss_coefficient": 0.0},
    # Half of each head rotates, whatever the config says of it; and how many logits generation asks for.
    harmless=MAMBA_HARMLESS | {"attn_rotary_emb", "num_logits_to_keep"},
    partial=0.5,
    files=LLAMA_FILES,
    example={"attn_layer_indices": [9, 18, 27]},
    optional=frozenset({"attn_layer_indices"}),
    published=("Bamba-9B-v2",),
)
