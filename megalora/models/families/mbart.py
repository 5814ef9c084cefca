"""mBART and mBART-50: BART with a norm before each mixer and behind each stack; texts begin with their language."""

from megalora.models.barts import bart, bart_family, learned_positions
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    if hf.decoder_start_token_id is None:  # transformers begins with the last token of a target, a language
        hf.fail(
            "decoder_start_token_id is missing",
            "write the token of the language that targets are in, or for mBART-50 that of the end",
        )
    return bart(hf, learned_positions(hf), norms_embedding=True)


FAMILY = bart_family(
    "mbart",
    read,
    {
        "add_final_layer_norm": True, "normalize_before": True, "normalize_embedding": True,
        "static_position_embeddings": False,
    },
    harmless=frozenset({"forced_eos_token_id"}),
    example={"decoder_start_token_id": 2},
    published=("mbart-large-50-many-to-many-mmt",),
)  # fmt: skip
