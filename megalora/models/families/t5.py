"""T5, Flan-T5 and mT5: an encoder-decoder with a learned bias of the scores by distance, and unscaled scores."""

from collections.abc import Iterator
from dataclasses import replace

from megalora.models.family import Family, Fields
from megalora.models.parts import head_start
from megalora.models.spec import (
    MLP,
    Attention,
    CrossAttention,
    Embedding,
    Encoder,
    FileNames,
    Head,
    Layer,
    Linear,
    ModelSpec,
    Norm,
    RelativeTable,
    Residual,
    Stack,
)

_NO_LONGEST = 1 << 20  # tokens of a document: positions are distances, and all far ones are alike


def read(hf: Fields, *, shares_tables: bool = True) -> ModelSpec:
    """Return the model; shares_tables: the layers of a stack have one bias by distance."""
    count, drop = hf.num_layers, hf.dropout_rate
    words = Embedding("shared", hf.vocab_size, hf.d_model, dropout=drop)
    encoder, decoder = (
        tuple(_layers(hf, stack, n, shares_tables)) for stack, n in (("encoder", count), ("decoder", _decoders(hf)))
    )
    norm = _norm(hf, "encoder.final_layer_norm")
    # The head of T5 1.1 and of Flan-T5 is their own: their files say so, and their config by not tying it.
    scale = hf.d_model**-0.5 if hf.reads("scale_decoder_outputs") and hf.scale_decoder_outputs else 1.0
    return ModelSpec(
        words,
        Stack(
            "decoder.block",
            encoder + decoder,
            _norm(hf, "decoder.final_layer_norm"),
            drop,
            Encoder("encoder.block", count, words, norm, drop, *head_start(hf)),
        ),
        Head("lm_head", tied=True, scale=scale),
        _NO_LONGEST,
    )


def _decoders(hf: Fields) -> int:
    return hf.num_layers if hf.num_decoder_layers is None else hf.num_decoder_layers


def _norm(hf: Fields, name: str) -> Norm:
    return Norm(name, hf.d_model, hf.layer_norm_epsilon)


def _layers(hf: Fields, stack: str, count: int, shares_tables: bool) -> Iterator[Layer]:
    """Yield the layers of the encoder or the decoder."""
    size, heads, drop, decodes = hf.d_model, hf.num_heads, hf.dropout_rate, stack == "decoder"
    inner, buckets, longest = heads * hf.d_kv, hf.relative_attention_num_buckets, hf.relative_attention_max_distance
    if buckets % 4 or longest <= buckets:
        hf.fail(
            f"relative_attention_num_buckets ({buckets}) must be a multiple of 4 below "
            f"relative_attention_max_distance ({longest}): correct them"
        )

    def linears(at: str) -> tuple[Linear, Linear, Linear, Linear]:
        q, k, v = (Linear(f"{at}.{name}", size, inner) for name in "qkv")
        return q, k, v, Linear(f"{at}.o", inner, size)

    def step(number: int, mixer: Attention | CrossAttention | MLP) -> Residual:
        return Residual(mixer, _norm(hf, f"layer.{number}.layer_norm"), dropout=drop)

    last = 2 if decodes else 1
    at = f"layer.{last}.DenseReluDense"
    down = Linear(f"{at}.wo", hf.d_ff, size)
    up, gate = (Linear(f"{at}.{name}", size, hf.d_ff) for name in ("wi_1", "wi_0"))
    mlp = MLP(up, down, hf.d_ff, hf.activation_of("dense_act_fn"), gate, dropout=drop)
    if not hf.is_gated_act:
        mlp = MLP(Linear(f"{at}.wi", size, hf.d_ff), down, hf.d_ff, mlp.act, dropout=drop)
    attention = Attention(
        *linears("layer.0.SelfAttention"), heads, heads, hf.d_kv, None, scale=1.0, causal=decodes, dropout=drop
    )
    cross = CrossAttention(*linears("layer.1.EncDecAttention"), heads, hf.d_kv, scale=1.0, dropout=drop)
    feed = step(last, mlp)
    for index in range(count):
        at = f"{stack}.block.{0 if shares_tables else index}.layer.0.SelfAttention.relative_attention_bias"
        table = RelativeTable(at, buckets, longest, both_ways=not decodes)
        own = step(0, replace(attention, position=table))
        yield (own, step(1, cross), feed) if decodes else (own, feed)


FAMILY = Family(
    ("t5", "mt5"),
    read,
    reads=frozenset(
        """vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads relative_attention_num_buckets
        relative_attention_max_distance dropout_rate layer_norm_epsilon feed_forward_proj dense_act_fn is_gated_act
        scale_decoder_outputs tie_word_embeddings decoder_start_token_id pad_token_id forced_bos_token_id""".split()
    ),
    fixed={"is_encoder_decoder": True},
    harmless=frozenset({"initializer_factor", "classifier_dropout", "n_positions", "output_past"}),
    rotates=False,
    optional=frozenset({"decoder_start_token_id", "forced_bos_token_id", "num_decoder_layers", "pad_token_id"}),
    files=FileNames(
        # Copies of shared.weight, which transformers does not read either, and a table that no layer has.
        ignored=(
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "EncDecAttention.relative_attention_bias.weight",
        ),
    ),
    architectures=frozenset({"ForConditionalGeneration", "Model"}),
)
