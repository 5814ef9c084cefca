"""BLIP-2: OPT or T5 behind the vectors of an image, which a frozen vision tower and Q-Former make."""

from dataclasses import fields

from megalora.models.config import HARMLESS, config_from_dict
from megalora.models.family import Family, Fields
from megalora.models.nested import below
from megalora.models.prefix import ImagePrefix, QFormer, VisionTower
from megalora.models.spec import ModelSpec

LANGUAGE_MODELS = ("opt", "t5")
# With what transformers has where they are left out.
_VISION = {
    "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
}  # fmt: skip
_QFORMER = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "cross_attention_frequency": 2,
}  # fmt: skip
_NO_EFFECT = HARMLESS | {"initializer_factor", "dropout", "num_channels", "projection_dim"}
# Dropouts of what is frozen: it runs as in evaluation. The rest is of texts, which this Q-Former does not read.
_OF_QFORMER = {"vocab_size", "max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob"}
_OF_QFORMER |= {"encoder_hidden_size", "pad_token_id", "position_embedding_type", "classifier_dropout"}


def read(hf: Fields) -> ModelSpec:
    vision = hf.nested("vision_config", _VISION, {"attention_dropout": 0.0}, _NO_EFFECT)
    qformer = hf.nested("qformer_config", _QFORMER, {"use_qformer_text_input": False}, _NO_EFFECT | _OF_QFORMER)
    for name, part in (("vision_config", vision), ("qformer_config", qformer)):
        if part.hidden_size % part.num_attention_heads:
            hf.fail(
                f"{name}.hidden_size ({part.hidden_size}) is not a multiple of num_attention_heads "
                f"({part.num_attention_heads})",
                "correct it",
            )
    text = hf.text_config
    kind = text.get("model_type", "opt")
    if kind not in LANGUAGE_MODELS:
        hf.fail(
            f"text_config.model_type = {kind!r} is not implemented",
            f"take a model whose text_config is of {' or '.join(LANGUAGE_MODELS)}",
        )
    language = config_from_dict({**text, "model_type": kind}, f"{hf.where}: text_config")
    if language.embedding.project is not None:
        hf.fail("text_config.word_embed_proj_dim must be hidden_size, which an image has", "take another model")
    if hf.image_token_index >= language.vocab_size:
        hf.fail(
            f"image_token_index ({hf.image_token_index}) is not below text_config.vocab_size ({language.vocab_size})",
            "resize the embedding with transformers first",
        )
    tower = VisionTower(**{one.name: getattr(vision, one.name) for one in fields(VisionTower)})
    own = {name: getattr(qformer, name) for name in _QFORMER}
    prefix = ImagePrefix(
        tower,
        QFormer(**own, encoder_hidden_size=tower.hidden_size),
        hf.num_query_tokens,
        hf.image_token_index,
        language.hidden_size,
    )
    return below(language, "language_model.", prefix)


FAMILY = Family(
    ("blip-2",),
    read,
    reads=frozenset(
        "vision_config qformer_config text_config num_query_tokens image_token_index is_encoder_decoder".split()
    ),
    harmless=frozenset(
        "use_decoder_only_language_model image_text_hidden_size initializer_factor tie_word_embeddings".split()
    ),
    rotates=False,
    example={"image_token_index": 50265},
    architectures=frozenset({"ForConditionalGeneration", "Model"}),
)
