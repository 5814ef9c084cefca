"""PEGASUS: BART with a norm before each mixer and behind each stack, and positions that are sines and cosines."""

from megalora.models.barts import bart, bart_family
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec, Positions


def read(hf: Fields) -> ModelSpec:
    size = hf.d_model
    waves = tuple(10000 ** (-2 * j / size) for j in range(size // 2))
    return bart(hf, lambda name: Positions(name, hf.max_position_embeddings, waves=waves, precise=True))


FAMILY = bart_family(
    "pegasus",
    read,
    {
        "add_final_layer_norm": True, "normalize_before": True, "normalize_embedding": False,
        "static_position_embeddings": True,
    },
    harmless=frozenset({"extra_pos_embeddings", "forced_eos_token_id"}),
    ignored=("embed_positions.weight",),  # which are computed
    published=("pegasus-xsum",),
)  # fmt: skip
