"""What vLLM and SGLang are known not to read of an adapter is said."""

import pytest

from megalora.adapters.config import LoraConfig
from megalora.checkpoint.adapter.engines import engines_caution

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("fields", "modules", "said"),
    [
        ({}, [Q], None),
        ({"target_modules": "all-linear"}, [Q], None),
        ({"r": 16}, [Q], None),
        ({"r": 48}, [Q], "--max-lora-rank 64 or more"),
        ({"r": 1024}, [Q], "without r = 1024"),
        ({"use_dora": True}, [Q], "without use_dora"),
        ({"bias": "lora_only"}, [Q], "without bias"),
        ({"modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}}, [Q], "without modules_to_save, rank_pattern"),
        ({"trainable_token_indices": [3]}, [Q], "without trainable_token_indices"),
        ({"target_modules": ["q_proj", "lm_head"]}, [Q, "lm_head"], "without lm_head"),
        ({"target_modules": ".*q_proj"}, [Q], "without a regular expression as target_modules"),
    ],
)
def test_caution(fields, modules, said):
    found = engines_caution(LoraConfig.from_dict(fields).to_dict(), modules)
    assert found is None if said is None else said in found
