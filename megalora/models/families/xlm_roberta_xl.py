"""XLM-RoBERTa-XL and XXL: RoBERTa with a norm before each mixer and behind the last layer, none on the embedding."""

from dataclasses import replace

from megalora.models.encoders import encoder, token_head, two_linear_head
from megalora.models.families import roberta
from megalora.models.family import Fields
from megalora.models.parts import layer_norms
from megalora.models.spec import ModelSpec, Residual, Stack


def read(hf: Fields) -> ModelSpec:
    spec = encoder(hf, "roberta", (token_head(hf), two_linear_head(hf, "tanh")), offset=hf.pad_token_id + 1)
    own, feed = (step.branches[0] for step in spec.stack.layers[0])
    norm = layer_norms(hf.hidden_size, hf.layer_norm_eps)
    layer = (
        Residual(own.mixer, norm("attention.self_attn_layer_norm"), dropout=own.dropout),
        Residual(feed.mixer, norm("LayerNorm")),
    )
    stack = Stack(spec.stack.prefix, (layer,) * hf.num_hidden_layers, norm("roberta.encoder.LayerNorm"))
    return replace(spec, embedding=replace(spec.embedding, norm=None), stack=stack)


FAMILY = replace(
    roberta.FAMILY, types=("xlm-roberta-xl",), read=read,
    published=("xlm-roberta-xl",),
)
