"""What a run tells of itself: FLOPs count the experts that a token goes through, not all that there are."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from oracle import fields_of

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.models.config import config_from_dict
from megalora.summary import flops_per_token

FIELDS = {
    "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "num_local_experts": 6, "num_experts_per_tok": 2,
}  # fmt: skip
ROWS = SimpleNamespace(lengths=np.array([9, 9]), tokens=18, sides=None)


def test_only_the_experts_of_a_token_count():
    def flops(experts: int, targets: list[str]) -> float:
        config = config_from_dict(FIELDS | {"num_local_experts": experts})
        return flops_per_token(config, resolve_lora(LoraConfig(r=4, target_modules=targets), config), ROWS)

    router = 4 * 2 * 32  # each expert more is a logit more, in two layers
    for targets in (["q_proj"], ["q_proj", "w1", "w2", "w3"]):
        assert flops(6, targets) - flops(2, targets) == 4 * router
    branch = 2 * 2 * 3 * 4 * (32 + 48)  # two layers, two experts of three linears, r 4
    assert flops(6, ["q_proj", "w1", "w2", "w3"]) - flops(6, ["q_proj"]) == 6 * branch


def pairs_of(name: str, *documents: tuple[int, ...]) -> float:
    """Pairs of a token and a key in all layers, as the FLOPs of documents, or of pairs of source and target, count
    them.
    """
    config, lengths = config_from_dict(fields_of(name)), np.array(documents)
    rows = SimpleNamespace(lengths=lengths.sum(1), tokens=int(lengths.sum()), sides=None)
    if lengths.shape[1] == 2:
        rows.sides, rows.source, rows.members = SimpleNamespace(lengths=lambda _: lengths), None, slice(None)
    lora = resolve_lora(LoraConfig(r=4, target_modules="all-linear"), config)
    counted = flops_per_token(config, lora, rows)
    with mock.patch("megalora.summary._keys_of_a_layer", lambda *_: 0.0):
        counted -= flops_per_token(config, lora, rows)
    return counted * rows.tokens / (3.5 * 4 * config.num_attention_heads * config.head_dim)


def test_attention_counts_the_keys_that_each_layer_sees():
    assert pairs_of("llama", (9,), (4,)) == pytest.approx(4 * (45 + 10))
    assert pairs_of("bert", (9,), (4,)) == pytest.approx(4 * (81 + 16)), "it looks both ways"
    local = 9 * 7 - 2 * (1 + 2 + 3) + 16  # those up to 3 away
    assert pairs_of("modernbert", (9,), (4,)) == pytest.approx(2 * (81 + 16) + 2 * local)
    decoder = (3 + 15) + (9 * 2 + 4 * 5)  # itself and its source
    assert pairs_of("t5", (9, 2), (4, 5)) == pytest.approx(2 * (81 + 16) + 2 * decoder)
