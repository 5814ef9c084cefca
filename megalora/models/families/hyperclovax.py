"""HyperCLOVA X SEED Think: Granite with norms behind each block too, and logits that are multiplied."""

from megalora.models.families.granite import FIELDS, decoder_of
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FILES, gated_mlp, rms
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    behind = (rms(hf, "post_norm1"), rms(hf, "post_norm2")) if hf.use_post_norm else (None, None)
    return decoder_of(hf, gated_mlp(hf, hf.mlp_bias), hf.logits_scaling, behind)


FAMILY = Family(
    ("hyperclovax",),
    read,
    reads=FIELDS | {"use_post_norm"},
    fixed={"hidden_act": "silu"},
    harmless=frozenset({"end_token_id"}),
    files=LLAMA_FILES,
    published=("HyperCLOVAX-SEED-Think-14B",),
)
