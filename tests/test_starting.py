"""An adapter to start from, against the --lora_config that is given too."""

import pytest

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.errors import UserError
from megalora.models.config import config_from_dict
from megalora.starting import Start, _check_same_adapter

CONFIG = config_from_dict(
    {
        "model_type": "qwen2",  # with biases
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        ({"r": 4}, {"r": 8}, r"q_proj has \(r, scaling\) = \(4, 2.0\), but --lora_config means \(8, 1.0\)"),
        ({}, {"modules_to_save": [HEAD]}, r"of lm_head.weight it trained nothing, but --lora_config means \[64, 32\]"),
        ({"modules_to_save": [HEAD]}, {}, r"of lm_head.weight it trained \[64, 32\], but --lora_config means nothing"),
        ({"bias": "lora_only"}, {}, r"q_proj.bias it trained \[32\], but --lora_config means nothing"),
        ({"use_dora": True}, {}, r"lora_magnitude_vector it trained \[32\], but --lora_config means nothing"),
        (
            {"trainable_token_indices": [3, 5]},
            {"trainable_token_indices": [4, 5]},  # as many: their shapes are the same
            r"of model.embed_tokens it trained the rows of tokens \[3, 5\], but --lora_config means \[4, 5\]",
        ),
        ({"trainable_token_indices": [3]}, {}, r"the rows of tokens \[3\], but --lora_config means \[\]"),
    ],
)
def test_what_is_another_adapter_is_named(theirs, ours, told):
    fields = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    start = Start(AdapterCheckpoint(fields | theirs, {}, where="there"), own=False)
    with pytest.raises(UserError, match=f"adapter there: .*{told}") as refused:
        _check_same_adapter(resolve_lora(LoraConfig.from_dict(fields | ours), CONFIG), start, CONFIG)
    assert "leave --lora_config out" in refused.value.hint
    _check_same_adapter(resolve_lora(LoraConfig.from_dict(fields | theirs), CONFIG), start, CONFIG)
