"""GLM-4.7-Flash: DeepSeek-V3's latent attention and experts; each layer says whether it has experts."""

import dataclasses

from megalora.models.families.deepseek_v3 import FAMILY as DEEPSEEK
from megalora.models.families.deepseek_v3 import deepseek_like, latent_attention, sigmoid_experts, sparse_layers
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    first, sparse = hf.first_k_dense_replace, sparse_layers(hf)
    if first is not None and sparse != tuple(layer >= first for layer in range(len(sparse))):
        dense = sparse.count(False)
        hf.fail(
            f"first_k_dense_replace ({first}) is not what mlp_layer_types says ({dense} dense layers; transformers' "
            "default is one), which alone is read",
            "correct mlp_layer_types",
        )
    if hf.rope["partial_rotary_factor"] != 1.0:  # of the features that a head has for that
        hf.fail("partial_rotary_factor is not 1", "take config.json from the model's own folder")
    spec = deepseek_like(hf, latent_attention(hf, hf.rope_interleave is not False), sigmoid_experts(hf))
    return dataclasses.replace(spec, predicting=hf.num_nextn_predict_layers or 0)


FAMILY = dataclasses.replace(
    DEEPSEEK,
    types=("glm4_moe_lite",),
    read=read,
    reads=DEEPSEEK.reads | {"mlp_layer_types"},
    partial=1.0,
    optional=frozenset({"first_k_dense_replace"}),
    published=("GLM-4.7-Flash",),
)
