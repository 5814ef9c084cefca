"""nanochat: RMSNorm without weights, also behind the embedding and the rotation, which turns the other way round."""

from dataclasses import replace

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    grouped_attention,
    head_dim,
    llama_ends,
    plain_mlp,
    scaled_ends,
)
from megalora.models.spec import Layer, ModelSpec, Norm, Residual, Rotary


def backwards(turned: Rotary) -> Rotary:
    """Return the rotation by the same angles in the other direction."""
    long = None if turned.long is None else tuple(-angle for angle in turned.long)
    return replace(turned, inverse_frequencies=tuple(-angle for angle in turned.inverse_frequencies), long=long)


def read(hf: Fields) -> ModelSpec:
    bias, dim = bool(hf.attention_bias), head_dim(hf)

    def norm(name: str, size: int | None = None) -> Norm:
        return Norm(name, size or hf.hidden_size, hf.rms_norm_eps, weighted=False)

    attention = grouped_attention(
        hf, bias=bias, out_bias=bias, q_norm=norm("self_attn.q_norm", dim), k_norm=norm("self_attn.k_norm", dim),
        turns_first=True,
    )  # fmt: skip
    attention = replace(attention, position=backwards(hf.rotary(dim)))
    mlp = plain_mlp(hf, "mlp.fc1", "mlp.fc2", hf.intermediate_size, "hidden_act", bias=False)

    def layer(index: int) -> Layer:
        return (Residual(attention, norm("input_layernorm")), Residual(mlp, norm("post_attention_layernorm")))

    spec = scaled_ends(llama_ends(hf, layer, norm("model.norm")), softcap=hf.final_logit_softcapping)
    return replace(spec, embedding=replace(spec.embedding, norm=norm("model.embed_norm")))


FAMILY = Family(
    ("nanochat",),
    read,
    reads=LLAMA_FIELDS | {"attention_bias", "hidden_act", "final_logit_softcapping"},
    fixed={"attention_dropout": 0.0},
    files=LLAMA_FILES,
)
