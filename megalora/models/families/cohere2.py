"""Command R7B and Command A: Cohere's layers, three with a sliding window and rotations, the fourth with neither."""

from megalora.models.families.cohere import FIELDS, decoder_of
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FILES, LLAMA_FIXED, grouped_attention, layer_windows
from megalora.models.spec import Attention, ModelSpec


def read(hf: Fields) -> ModelSpec:
    window, bias = layer_windows(hf), hf.attention_bias

    def attention(index: int) -> Attention:
        rotates = window[index] is not None
        return grouped_attention(
            hf, bias=bias, out_bias=bias, window=window[index], rotates=rotates, interleaved=True
        )

    return decoder_of(hf, attention)


FAMILY = Family(
    ("cohere2",),
    read,
    reads=FIELDS | {"head_dim", "layer_types", "sliding_window"},
    fixed=LLAMA_FIXED
    | {
        "position_embedding_type": "rope_gptj", "rotary_pct": 1.0, "use_embedding_sharing": True,
        "use_gated_activation": True, "use_parallel_block": True, "use_qk_norm": False,
        "order_of_interleaved_layers": "local_attn_first",
    },  # fmt: skip
    harmless=frozenset({"cache_implementation", "layer_switch", "sliding_window_pattern", "use_parallel_embedding"}),
    files=LLAMA_FILES,
    published=("c4ai-command-r7b-12-2024",),
)
