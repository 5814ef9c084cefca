"""What each field of a config.json may hold: a range for every number, a kind for everything else.

A family reads no field without an entry here (megalora.models.family.Fields), so that a config of a stranger can
neither end in a traceback nor ask for memory or time without end. Fields within an object are `object.field`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

MOST_LAYERS = 1 << 12


class Bound(Protocol):
    """What a field may hold. told: in words, behind "give"."""

    @property
    def told(self) -> str: ...

    def allows(self, value: Any) -> bool:
        """Return whether the field may have this value, which is not None. Raises nothing, whatever the value."""
        ...


@dataclass(frozen=True)
class Number:
    """A number from `least` to `most`; whole: an integer."""

    whole: bool
    least: float
    most: float

    @property
    def told(self) -> str:
        return f"a {'whole number' if self.whole else 'number'} from {self.least:g} to {self.most:g}"

    def allows(self, value: Any) -> bool:
        kind = int if self.whole else (int, float)
        return isinstance(value, kind) and not isinstance(value, bool) and self.least <= value <= self.most


@dataclass(frozen=True)
class Flag:
    """True or false."""

    told: str = "true or false"

    def allows(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Word:
    """A short text."""

    told: str = "a name"

    def allows(self, value: Any) -> bool:
        return isinstance(value, str) and len(value) <= 100


@dataclass(frozen=True)
class Each:
    """A list of at most `most` values, each of which `of` allows."""

    of: Bound
    most: int

    @property
    def told(self) -> str:
        return f"a list of at most {self.most} entries, each {self.of.told}"

    def allows(self, value: Any) -> bool:
        return isinstance(value, (list, tuple)) and len(value) <= self.most and all(map(self.of.allows, value))


@dataclass(frozen=True)
class OneOrEach:
    """A number, or a list with one for each layer."""

    of: Number

    @property
    def told(self) -> str:
        return f"{self.of.told}, or a list of these for the layers"

    def allows(self, value: Any) -> bool:
        return self.of.allows(value) or Each(self.of, MOST_LAYERS).allows(value)


@dataclass(frozen=True)
class NumberOr:
    """A number, or one other value."""

    of: Number
    other: str | float

    @property
    def told(self) -> str:
        return f"{self.of.told}, or {self.other!r}"

    def allows(self, value: Any) -> bool:
        return value == self.other or self.of.allows(value)


@dataclass(frozen=True)
class Kinds:
    """A list of names, or one text with "|" between them."""

    told: str = 'a list of names, or a text such as "p2c|c2p"'

    def allows(self, value: Any) -> bool:
        return Word().allows(value) or Each(Word(), 100).allows(value)


@dataclass(frozen=True)
class Repeated:
    """A list of [list of names, times that it is repeated], of so many layers together as a model can have."""

    told: str = f"a list of [names of kinds of layers, repetitions], {MOST_LAYERS} layers at most"

    def allows(self, value: Any) -> bool:
        if not isinstance(value, (list, tuple)) or len(value) > MOST_LAYERS:
            return False
        names, times = Each(Word(), MOST_LAYERS), Number(True, 0, MOST_LAYERS)
        pairs = all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value)
        good = pairs and all(names.allows(kinds) and times.allows(count) for kinds, count in value)
        return good and sum(len(kinds) * count for kinds, count in value) <= MOST_LAYERS


@dataclass(frozen=True)
class Object:
    """An object, whose own fields have entries of their own."""

    told: str = "an object"

    def allows(self, value: Any) -> bool:
        return isinstance(value, Mapping)


def _all(bound: Bound, names: str) -> dict[str, Bound]:
    return dict.fromkeys(names.split(), bound)


def _of(objects: tuple[str, ...], bound: Bound, names: str) -> dict[str, Bound]:
    return _all(bound, " ".join(f"{owner}.{name}" for owner in objects for name in names.split()))


_HEADS, _EXPERTS, _LENGTH = Number(True, 1, 1 << 14), Number(True, 1, 1 << 14), Number(True, 1, 1 << 32)
_LAYERS = Number(True, 0, MOST_LAYERS)
BOUNDS: Mapping[str, Bound] = {
    **_all(
        Number(True, 1, 1 << 24),
        """hidden_size intermediate_size moe_intermediate_size shared_expert_intermediate_size n_inner ffn_dim
        ffn_hidden_size embedding_size word_embed_proj_dim q_lora_rank kv_lora_rank d_model d_ff encoder_ffn_dim
        decoder_ffn_dim intermediate_size_mlp prefix_dense_intermediate_size moe_shared_expert_intermediate_size
        pooler_hidden_size dim_model_base
        hidden_dim""",
    ),
    **_all(Number(True, 1, 1 << 28), "vocab_size padded_vocab_size"),
    **_all(Number(True, 0, 1 << 24), "shared_intermediate_size"),
    **_all(Number(True, 0, 1 << 16), "type_vocab_size"),
    **_all(Number(True, 1, 1 << 16), "task_type_vocab_size"),
    **_all(Number(True, 0, 1 << 28), "pad_token_id decoder_start_token_id forced_bos_token_id"),
    # layers
    **_all(
        Number(True, 1, MOST_LAYERS),
        """num_hidden_layers decoder_sparse_step moe_layer_interval num_layers num_decoder_layers encoder_layers
        decoder_layers global_attn_every_n_layers full_attention_interval prefix_dense_sliding_window_pattern""",
    ),
    "moe_layer_end_index": Number(True, -1, MOST_LAYERS),
    **_all(_LAYERS, "max_window_layers first_k_dense_replace moe_layer_start_index num_dense_layers"),
    **_all(Number(True, 0, 1 << 8), "num_nextn_predict_layers num_mtp_modules"),
    **_all(Each(Word(), MOST_LAYERS), "layer_types mlp_layer_types attention_layers layers_block_type"),
    **_all(Each(_LAYERS, MOST_LAYERS), "mlp_only_layers moe_layers full_attn_idxs attn_layer_indices"),
    **_all(Each(Number(True, 0, 1), MOST_LAYERS), "no_rope_layers attn_type_list"),
    **_all(OneOrEach(Number(True, 1, 1 << 10)), "moe_topk num_shared_expert"),
    "experts_intermediate_size": OneOrEach(Number(True, 1, 1 << 24)),
    "layer_rope_theta": Each(Number(False, 0.0, 1e15), MOST_LAYERS),
    "attention_types": Repeated(),
    "expansion_ratio": Number(True, 1, 1 << 8),
    "block_multiple_of": Number(True, 1, 1 << 16),
    # heads
    **_all(
        _HEADS,
        """num_attention_heads num_key_value_heads num_kv_heads multi_query_group_num num_heads
        encoder_attention_heads decoder_attention_heads linear_num_key_heads linear_num_value_heads""",
    ),
    **_all(Number(True, 1, 1 << 14), "qk_nope_head_dim v_head_dim kv_channels d_kv linear_key_head_dim"),
    **_all(Number(True, 1, 1 << 14), "linear_value_head_dim linear_conv_kernel_dim conv_L_cache"),
    **_all(Number(True, 4, 1 << 16), "relative_attention_num_buckets relative_attention_max_distance"),
    **_all(Number(True, -1, 1 << 16), "max_relative_positions position_buckets"),
    **_all(Number(True, 2, 1 << 14), "head_dim full_head_dim qk_rope_head_dim rotary_dim attention_head_size"),
    "full_kv_heads": _HEADS,
    "num_ln_in_parallel_attn": Number(True, 1, 2),
    "mamba_d_head": NumberOr(Number(True, 1, 1 << 14), "auto"),
    **_all(_HEADS, "mamba_n_heads mamba_n_groups mamba_num_heads n_groups"),
    **_all(Number(True, 1, 1 << 14), "mamba_d_state ssm_state_size mamba_head_dim mamba_d_conv conv_kernel"),
    "mamba_expand": Number(False, 1e-3, 1e3),
    "mamba_d_ssm": Number(True, 1, 1 << 24),
    **_all(Each(Number(False, 1e-9, 1e9), 5), "ssm_multipliers mlp_multipliers"),
    "time_step_limit": Each(NumberOr(Number(False, 0.0, 1e9), math.inf), 2),
    # documents
    **_all(_LENGTH, "max_position_embeddings max_seq_len seq_length window_size attention_chunk_size local_attention"),
    "max_2d_position_embeddings": Number(True, 1, 1 << 16),
    "sliding_window": Number(True, 0, 1 << 32),  # transformers writes 0 where use_sliding_window is false
    # experts
    "num_local_experts": Number(True, 0, 1 << 14),  # 0 of a dense model of a family that has experts
    **_all(_EXPERTS, "num_experts n_routed_experts moe_num_experts n_group topk_group"),
    **_all(Number(True, 0, 1 << 10), "num_experts_per_tok top_k_experts"),
    **_all(Number(True, 0, 1 << 10), "n_shared_experts moe_num_shared_experts num_shared_experts"),
    # factors
    **_all(
        Number(False, 1e-30, 1.0),
        """rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_eps norm_epsilon""",
    ),
    **_all(
        Number(False, 1e-9, 1e9),
        """routed_scaling_factor route_scale router_scaling_factor attention_multiplier embedding_multiplier
        residual_multiplier logits_scaling logit_scale query_pre_attn_scalar attn_logit_softcapping
        final_logit_softcapping scale_emb scale_depth mup_embeddings_scale mup_output_alpha mup_width_scale
        block_ffn_dim_multiplier ssm_in_multiplier ssm_out_multiplier attention_in_multiplier
        attention_out_multiplier key_multiplier lm_head_multiplier
        floor_scale attn_scale swiglu_alpha swiglu_limit clip_qkv attn_config.softmax_scale attn_config.clip_qkv""",
    ),
    "router_jitter_noise": Number(False, 0.0, 1.0),
    "attn_config.alibi_bias_max": Number(False, 1e-3, 1e3),
    **_all(
        Number(False, 0.0, 0.99),
        """attention_dropout attention_probs_dropout_prob attn_config.attn_pdrop attn_pdrop classifier_dropout dropout
        embd_pdrop embed_dropout embedding_dropout hidden_dropout hidden_dropout_prob resid_dropout resid_pdrop
        residual_dropout dropout_rate activation_dropout pooler_dropout cls_dropout
        seq_classif_dropout mlp_dropout""",
    ),
    # what is no number
    **_all(
        Flag(),
        """_remove_final_layer_norm add_qkv_bias alibi attention_bias bias do_layer_norm_before enable_bias mlp_bias
        multi_query multi_query_attention mup_scale_qk_dot_by_d new_decoder_architecture norm_topk_prob
        parallel_attn position_encoding_2d qk_layernorm qkv_bias rope_interleave scale_attn_by_inverse_layer_idx
        scale_attn_weights attn_temperature_tuning tie_word_embeddings use_bias use_parallel_residual use_qk_norm
        use_qkv_bias use_sliding_window scale_embedding scale_decoder_outputs is_gated_act relative_attention
        share_att_key position_biased_input attention_out_bias attention_k_eq_v mup_enabled enable_moe_block conv_bias
        use_conv_bias projectors_bias mamba_rms_norm mamba_norm_before_gate mamba_conv_bias mamba_proj_bias
        lm_head_bias
        block_auto_adjust_ff_dim use_expert_bias use_post_norm norm_bias classifier_bias use_task_id""",
    ),
    **_all(
        Word(),
        """expert_selection_fn shared_expert_combination_strategy use_bidirectional_attention activation
        activation_function hidden_act hidden_activation topk_method scoring_func feed_forward_proj dense_act_fn
        position_embedding_type mlp_hidden_act pooler_hidden_act norm_rel_ebd classifier_pooling
        classifier_activation""",
    ),
    "pos_att_type": Kinds(),
    **_all(Object(), "attn_config vision_config qformer_config text_config own_of_layers"),
    # of blip-2
    **_all(Number(True, 1, 1 << 14), "num_query_tokens"),
    **_all(Number(True, 0, 1 << 28), "image_token_index"),
    **_all(Flag(), "is_encoder_decoder"),
    **_of(("vision_config", "qformer_config"), Number(True, 1, 1 << 20), "hidden_size intermediate_size"),
    **_of(("vision_config", "qformer_config"), Number(True, 1, MOST_LAYERS), "num_hidden_layers"),
    **_of(("vision_config", "qformer_config"), _HEADS, "num_attention_heads"),
    **_of(("vision_config", "qformer_config"), Number(False, 1e-30, 1.0), "layer_norm_eps"),
    **_of(("vision_config", "qformer_config"), Word(), "hidden_act"),
    **_of(("vision_config",), Number(True, 1, 1 << 14), "image_size patch_size"),
    **_of(("vision_config",), Flag(), "qkv_bias"),
    **_of(("qformer_config",), Number(True, 1, MOST_LAYERS), "cross_attention_frequency"),
}
# Fields that mean something where they are null or left out; a number of any other name must be there.
OPTIONAL = frozenset(
    """head_dim num_key_value_heads time_step_limit n_inner word_embed_proj_dim q_lora_rank num_nextn_predict_layers
    layer_types mlp_only_layers sliding_window attention_chunk_size n_group topk_group
    num_ln_in_parallel_attn classifier_dropout attn_logit_softcapping final_logit_softcapping attn_config
    clip_qkv attn_config.softmax_scale attn_config.clip_qkv""".split()
)
