"""Published encoders and encoder-decoders: their config.json is read, with transformers' names and shapes."""

import pytest
import torch
import transformers

from megalora.models.config import config_from_dict
from megalora.models.published import NAMED

AUTO = {
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
}
_DISTILBERT = {
    "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1, "dim": 768,
    "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02, "max_position_embeddings": 512,
    "model_type": "distilbert", "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522,
}  # fmt: skip
# With the parameters of each without a head.
CONFIGS = {
    "distilbert-base-uncased": (_DISTILBERT, 66_362_880),
    "distilbert-base-multilingual-cased": (_DISTILBERT | {"output_past": True, "vocab_size": 119547}, 134_734_080),
    "camembert-base": (
        {
            "architectures": ["CamembertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 5,
            "eos_token_id": 6, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
            "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
            "max_position_embeddings": 514, "model_type": "camembert", "num_attention_heads": 12,
            "num_hidden_layers": 12, "output_past": True, "pad_token_id": 1, "type_vocab_size": 1, "vocab_size": 32005,
        },
        110_031_360,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_published_encoders_have_the_names_of_transformers(name):
    raw, parameters = CONFIGS[name]
    for task, auto in AUTO.items():
        spec = config_from_dict(raw).for_task(task, ["a", "b", "c"])
        config = transformers.CONFIG_MAPPING[raw["model_type"]](
            num_labels=3, **{field: value for field, value in raw.items() if field != "model_type"}
        )
        with torch.device("meta"):
            theirs = auto.from_config(config)
        assert spec.tensors == {key: tuple(value.shape) for key, value in theirs.named_parameters()}
        of_head = sum(value.numel() for key, value in theirs.named_parameters() if key.startswith(spec.head.names))
        assert sum(value.numel() for value in theirs.parameters()) - of_head == parameters


def test_the_page_names_them():
    for kind in {raw["model_type"] for raw, _ in CONFIGS.values()} | NAMED.keys():
        assert {*NAMED[kind]} == {name for name, (raw, _) in CONFIGS.items() if raw["model_type"] == kind}, kind
