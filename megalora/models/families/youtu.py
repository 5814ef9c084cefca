"""Youtu-LLM: DeepSeek-V3's latent attention around llama's MLP."""

from megalora.models.families.deepseek_v3 import latent_attention
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FILES, LLAMA_FIXED, gated_mlp, llama_like
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    attention = latent_attention(hf, interleaved=hf.rope_interleave is not False)
    return llama_like(hf, lambda layer: attention, gated_mlp(hf))


FAMILY = Family(
    ("youtu",),
    read,
    reads=frozenset(
        """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size
        rms_norm_eps max_position_embeddings tie_word_embeddings q_lora_rank kv_lora_rank qk_nope_head_dim
        qk_rope_head_dim v_head_dim attention_bias rope_interleave""".split()
    ),
    fixed=LLAMA_FIXED | {"mlp_bias": False},
    harmless=frozenset({"head_dim", "qk_head_dim", "embedding_initializer_range"}),  # sums of others, and a start
    files=LLAMA_FILES,
)
