"""BART: an encoder-decoder with learned positions from row 2 on, whose sums are normed behind."""

from megalora.models.barts import bart, bart_family, learned_positions
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    return bart(hf, learned_positions(hf), norms_first=False, norms_embedding=True)


FAMILY = bart_family(
    "bart",
    read,
    {
        "add_final_layer_norm": False, "normalize_before": False, "normalize_embedding": True,
        "static_position_embeddings": False, "extra_pos_embeddings": 2,
    },
)  # fmt: skip
