"""MiniCPM3: DeepSeek's latent attention without experts, its embedding, residuals and logits scaled."""

from megalora.models.families.deepseek_v3 import HARMLESS, latent_attention
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FILES, LLAMA_FIXED, gated_mlp, llama_ends, rms, scaled_ends
from megalora.models.spec import Layer, ModelSpec, Residual


def read(hf: Fields) -> ModelSpec:
    attention, mlp = latent_attention(hf, interleaved=False), gated_mlp(hf, hf.mlp_bias)
    scale = hf.scale_depth / hf.num_hidden_layers**0.5

    def layer(index: int) -> Layer:
        return (
            Residual(attention, rms(hf, "input_layernorm"), scale=scale),
            Residual(mlp, rms(hf, "post_attention_layernorm"), scale=scale),
        )

    spec = llama_ends(hf, layer, rms(hf, "model.norm"))
    return scaled_ends(spec, embedding=hf.scale_emb, rounded=True, logits=hf.dim_model_base / hf.hidden_size)


FAMILY = Family(
    ("minicpm3",),
    read,
    reads=frozenset(
        """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size
        rms_norm_eps max_position_embeddings tie_word_embeddings q_lora_rank kv_lora_rank qk_nope_head_dim
        qk_rope_head_dim v_head_dim attention_bias mlp_bias scale_emb scale_depth dim_model_base""".split()
    ),
    fixed=LLAMA_FIXED,
    harmless=HARMLESS,
    files=LLAMA_FILES,
    published=("MiniCPM3-4B",),
)
