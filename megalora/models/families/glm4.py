"""GLM-4-0414 and GLM-Z1: GLM with norms before and behind each block."""

from megalora.models.families.glm import FIELDS, decoder_of
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FILES, LLAMA_FIXED, rms
from megalora.models.spec import Layer, Mixer, ModelSpec, Residual


def read(hf: Fields) -> ModelSpec:
    def layer(attention: Mixer, mlp: Mixer) -> Layer:
        return (
            Residual(attention, rms(hf, "input_layernorm"), rms(hf, "post_self_attn_layernorm")),
            Residual(mlp, rms(hf, "post_attention_layernorm"), rms(hf, "post_mlp_layernorm")),
        )

    return decoder_of(hf, layer)


FAMILY = Family(
    ("glm4",), read, reads=FIELDS, fixed=LLAMA_FIXED, partial=0.5, files=LLAMA_FILES,
    published=("GLM-4-9B-0414", "GLM-4-32B-0414"),
)
