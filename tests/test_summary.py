"""What a run tells of itself: FLOPs count the experts that a token goes through, not all that there are."""

from types import SimpleNamespace

import torch

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.models.config import config_from_dict
from megalora.summary import flops_per_token

FIELDS = {
    "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "num_local_experts": 6, "num_experts_per_tok": 2,
}  # fmt: skip
ROWS = SimpleNamespace(lengths=torch.tensor([9, 9]), tokens=18, sides=None)


def test_only_the_experts_of_a_token_count():
    def flops(experts: int, targets: list[str]) -> float:
        config = config_from_dict(FIELDS | {"num_local_experts": experts})
        return flops_per_token(config, resolve_lora(LoraConfig(r=4, target_modules=targets), config), ROWS)

    router = 4 * 2 * 32  # each expert more is a logit more, in two layers
    for targets in (["q_proj"], ["q_proj", "w1", "w2", "w3"]):
        assert flops(6, targets) - flops(2, targets) == 4 * router
    branch = 2 * 2 * 3 * 4 * (32 + 48)  # two layers, two experts of three linears, r 4
    assert flops(6, ["q_proj", "w1", "w2", "w3"]) - flops(6, ["q_proj"]) == 6 * branch
