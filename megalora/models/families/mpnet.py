"""MPNet and all-mpnet: RoBERTa's mathematics without kinds of texts, and with T5's bias of the scores by distance."""

from megalora.models.encoders import BERT_CLASSES, BERT_FIELDS, encoder, encoder_files, token_head, two_linear_head
from megalora.models.family import Family, Fields
from megalora.models.parts import head_dim
from megalora.models.spec import Attention, Linear, ModelSpec, RelativeTable

_BUCKETS, _LONGEST = 32, 128  # whatever the config says, as in transformers
_PADDING = 1  # likewise: positions begin behind its row


def read(hf: Fields) -> ModelSpec:
    size, heads, dropout = hf.hidden_size, hf.num_attention_heads, hf.attention_probs_dropout_prob
    if size % heads:
        hf.fail(f"num_attention_heads ({heads}) does not divide hidden_size ({size})", "correct it")
    table = RelativeTable("mpnet.encoder.relative_attention_bias", _BUCKETS, _LONGEST, both_ways=True)
    q, k, v, out = (Linear(f"attention.attn.{name}", size, size, True) for name in "qkvo")
    attention = Attention(q, k, v, out, heads, heads, head_dim(hf), table, causal=False, dropout=dropout)
    tasks = (token_head(hf), two_linear_head(hf, "tanh"))
    return encoder(hf, "mpnet", tasks, offset=_PADDING + 1, attention=attention, attention_norm="attention.LayerNorm")


FAMILY = Family(
    ("mpnet",),
    read,
    reads=BERT_FIELDS - {"type_vocab_size", "classifier_dropout"},
    fixed={"relative_attention_num_buckets": _BUCKETS},
    harmless=frozenset({"gradient_checkpointing", "tie_word_embeddings"}),
    rotates=False,
    generates=False,
    files=encoder_files("mpnet", "lm_head."),
    architectures=BERT_CLASSES,
    published=("mpnet-base", "all-mpnet-base-v2"),
)
