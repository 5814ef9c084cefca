"""What a run starts from: an adapter against --lora_config, tokens of a microbatch against the ranks."""

import re
from dataclasses import replace

import pytest

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.errors import UserError
from megalora.flags import parse_finetune
from megalora.models.config import config_from_dict
from megalora.parallel.mesh import Axis, ParallelMesh
from megalora.starting import Start, _check_length, _check_same_adapter

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


@pytest.mark.parametrize(
    ("cp", "tp", "told"),
    [
        (3, 1, r"\(1\) \* seq_length \(64\) = 64 tokens are not a multiple of context_parallel_size \(3\)$"),
        (32, 4, r"not a multiple of context_parallel_size \(32\) \* tensor_parallel_size \(4\)$"),
        (16, 4, None),
    ],
)
def test_tokens_that_context_parallel_ranks_cannot_share(cp, tp, told):
    required = {name: "x" for name in ("model_path", "data_path", "output_dir")}
    arguments = parse_finetune([word for name, value in required.items() for word in (f"--{name}", value)])
    data = replace(arguments.data, seq_length=64)
    mesh = ParallelMesh(cp=Axis(0, tuple(range(cp))), tp=Axis(0, tuple(range(tp))))
    if told is None:
        assert _check_length(CONFIG, data, arguments.train, True, mesh) == []
        return
    with pytest.raises(UserError) as refused:
        _check_length(CONFIG, data, arguments.train, tp > 1, mesh)
    assert re.search(told, refused.value.message) and refused.value.hint == "change seq_length"
