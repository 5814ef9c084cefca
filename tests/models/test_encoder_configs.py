"""Published encoders and encoder-decoders: their config.json is read, with transformers' names and shapes."""

import math

import pytest
import torch
import transformers

from megalora.models.config import config_from_dict

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
_MPNET = {
    "architectures": ["MPNetForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0, "eos_token_id": 2,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 514, "model_type": "mpnet",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "relative_attention_num_buckets": 32,
    "vocab_size": 30527,
}  # fmt: skip
_BART = {
    "activation_dropout": 0.0, "activation_function": "relu", "bos_token_id": 0, "d_model": 1024,
    "decoder_attention_heads": 16, "decoder_ffn_dim": 4096, "decoder_layerdrop": 0.0, "decoder_layers": 12,
    "decoder_start_token_id": 2, "dropout": 0.1, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096,
    "encoder_layerdrop": 0.0, "encoder_layers": 12, "eos_token_id": 2, "init_std": 0.02, "is_encoder_decoder": True,
    "max_length": 200, "max_position_embeddings": 1024, "num_hidden_layers": 12, "pad_token_id": 1,
    "scale_embedding": True, "use_cache": True,
}  # fmt: skip
_FAIRSEQ = {
    "add_bias_logits": False, "add_final_layer_norm": True, "classif_dropout": 0.0, "classifier_dropout": 0.0,
    "gradient_checkpointing": False, "normalize_before": True,
}  # fmt: skip
_MODERNBERT = {
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 50281, "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0,
    "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": True, "deterministic_flash_attn": False,
    "embedding_dropout": 0.0, "eos_token_id": 50282, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "gradient_checkpointing": False, "hidden_activation": "gelu", "hidden_size": 768, "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02, "intermediate_size": 1152, "layer_norm_eps": 1e-05, "local_attention": 128,
    "local_rope_theta": 10000.0, "max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0,
    "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 12,
    "num_hidden_layers": 22, "pad_token_id": 50283, "position_embedding_type": "absolute", "sep_token_id": 50282,
    "tie_word_embeddings": True, "torch_dtype": "float32", "vocab_size": 50368,
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
    "ernie-3.0-base-zh": (
        {
            "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
            "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048, "model_type": "ernie", "num_attention_heads": 12, "num_hidden_layers": 12,
            "pad_token_id": 0, "task_type_vocab_size": 3, "type_vocab_size": 4, "use_task_id": True,
            "vocab_size": 40000,
        },
        117_354_240,
    ),
    "xlm-roberta-xl": (
        {
            "architectures": ["XLMRobertaXLForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0,
            "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 2560,
            "initializer_range": 0.02, "intermediate_size": 10240, "layer_norm_eps": 1e-05,
            "max_position_embeddings": 514, "model_type": "xlm-roberta-xl", "num_attention_heads": 32,
            "num_hidden_layers": 36, "pad_token_id": 1, "position_embedding_type": "absolute", "type_vocab_size": 1,
            "use_cache": True, "vocab_size": 250880,
        },
        3_475_929_600,
    ),
    "mpnet-base": (_MPNET, 108_895_872),
    "all-mpnet-base-v2": (_MPNET, 108_895_872),
    "ModernBERT-base": (_MODERNBERT, 149_014_272),
    "ModernBERT-large": (
        _MODERNBERT
        | {"hidden_size": 1024, "intermediate_size": 2624, "num_attention_heads": 16, "num_hidden_layers": 28},
        394_781_696,
    ),
}  # fmt: skip


# Encoder-decoders, with the parameters of each.
PAIRS = {
    "mbart-large-50-many-to-many-mmt": (
        _BART
        | _FAIRSEQ
        | {
            "model_type": "mbart", "architectures": ["MBartForConditionalGeneration"], "attention_dropout": 0.0,
            "early_stopping": True, "forced_eos_token_id": 2, "normalize_embedding": True, "num_beams": 5,
            "output_past": True, "static_position_embeddings": False, "tokenizer_class": "MBart50Tokenizer",
            "vocab_size": 250054,
        },
        610_879_488,
    ),
    "pegasus-xsum": (
        _BART
        | _FAIRSEQ
        | {
            "model_type": "pegasus", "architectures": ["PegasusForConditionalGeneration"], "activation_dropout": 0.1,
            "attention_dropout": 0.1, "decoder_layers": 16, "decoder_start_token_id": 0, "encoder_layers": 16,
            "eos_token_id": 1, "extra_pos_embeddings": 1, "force_bos_token_to_be_generated": False,
            "forced_eos_token_id": 1, "length_penalty": 0.6, "max_length": 64, "max_position_embeddings": 512,
            "normalize_embedding": False, "num_beams": 8, "num_hidden_layers": 16, "pad_token_id": 0,
            "static_position_embeddings": True, "vocab_size": 96103,
        },
        568_699_904,
    ),
    "nllb-200-distilled-600M": (
        _BART
        | {
            "model_type": "m2m_100", "architectures": ["M2M100ForConditionalGeneration"], "attention_dropout": 0.1,
            "decoder_layerdrop": 0, "encoder_layerdrop": 0, "tokenizer_class": "NllbTokenizer", "vocab_size": 256206,
        },
        615_073_792,
    ),
    "umt5-small": (
        {
            "architectures": ["UMT5ForConditionalGeneration"], "classifier_dropout": 0.0, "d_ff": 1024, "d_kv": 64,
            "d_model": 512, "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1,
            "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0,
            "is_encoder_decoder": True, "is_gated_act": True, "layer_norm_epsilon": 1e-06, "model_type": "umt5",
            "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8, "output_past": True, "pad_token_id": 0,
            "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "scalable_attention": True,
            "tie_word_embeddings": False, "tokenizer_class": "T5Tokenizer", "use_cache": True, "vocab_size": 256384,
        },
        None,
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


@pytest.mark.parametrize("name", PAIRS)
def test_published_encoder_decoders_have_the_names_of_transformers(name):
    raw, parameters = PAIRS[name]
    fields = {field: value for field, value in raw.items() if field != "model_type"}
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(transformers.CONFIG_MAPPING[raw["model_type"]](**fields))
    theirs = dict(model.named_parameters())
    theirs |= {key: value for key, value in model.named_buffers() if key == "final_logits_bias"}
    if raw["model_type"] == "pegasus":  # whose sines and cosines are computed
        theirs = {key: value for key, value in theirs.items() if "embed_positions" not in key}
    ours = config_from_dict(raw).tensors
    assert ours == {key: tuple(value.shape) for key, value in theirs.items()}
    total = sum(math.prod(shape) for key, shape in ours.items() if key != "final_logits_bias")
    assert parameters is None or total == parameters
