"""A model's config.json, read through transformers, checked so that nothing in it is silently ignored."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.errors import UserError
from megalora.files import read_json
from megalora.models import families
from megalora.parallel.mesh import Axis
from megalora.parallel.split import Part, even_part, shard_range

# Fields that say nothing about the numbers of a training step, beside those of transformers' own base config.
_HARMLESS = frozenset(
    """_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
    add_cross_attention architectures bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version transformers.js_config typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache""".split()
)
# Rope types, with the fields that each reads besides rope_type and rope_theta.
_ROPE_FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
        "truncate".split()
    ),
}
# Fields with the one value at which they do not change the numbers.
_FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_causal": True,
}


@dataclass(frozen=True)
class Family:
    """What sets one model_type apart; each question is answered from the HF config object.

    qkv_bias, output_bias, mlp_bias  whether q k v, o, and the three MLP linears have a bias
    qk_norm                          RMSNorm over each head of q and k before the rotation
    windows                          the sliding window of each layer; None in a layer that sees all before it
    """

    model_type: str
    qkv_bias: Callable[[Any], bool] = lambda hf: False
    output_bias: Callable[[Any], bool] = lambda hf: False
    mlp_bias: Callable[[Any], bool] = lambda hf: False
    qk_norm: bool = False
    windows: Callable[[Any], tuple[int | None, ...]] = lambda hf: (None,) * hf.num_hidden_layers


@dataclass(frozen=True)
class ModelConfig:
    """All that the numbers of a model depend on besides its weights; HF's field names where HF has one.

    rope_inverse_frequencies  [head_dim / 2] float32 values; an angle is position * frequency
    rope_attention_factor     what cos and sin are multiplied by (yarn; 1 elsewhere)
    sliding_windows           of each layer; None: sees all before it
    dtype                     the dtype of the weights in the file, as config.json names it, or None
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    rope_inverse_frequencies: tuple[float, ...]
    rope_attention_factor: float
    dtype: str | None


def known_families() -> dict[str, Family]:
    """Every Family in `megalora.models.families`, by model_type."""
    found = {}
    for module in pkgutil.iter_modules(families.__path__):
        family = importlib.import_module(f"{families.__name__}.{module.name}").FAMILY
        found[family.model_type] = family
    return found


def read_config(path: str | Path) -> ModelConfig:
    """The ModelConfig of an HF folder, or of a config.json itself.

    Raises UserError that names file and field: for a missing or broken file, an unknown model_type, and any field that
    would change the numbers and is not implemented.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"model_path {path}: does not exist: name a Hugging Face folder")
    raw = read_json(file, "name a Hugging Face folder, or download it again", what="model_path")
    return config_from_dict(raw, str(file))


def config_from_dict(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig of the fields of a config.json, in its old or new form. Raises UserError as `read_config`."""
    kinds = known_families()
    family = kinds.get(str(raw.get("model_type")))
    if family is None:
        raise UserError(
            f"{where}: model_type = {raw.get('model_type')!r} is not implemented: megalora trains {', '.join(kinds)}"
        )
    rope = _rope_fields(raw, where)
    hf = _hf_config(family.model_type, raw, rope, where)
    _refuse_unknown(raw, hf, where)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    frequencies, factor = _rope_frequencies(hf, rope, head_dim, where)
    windows = family.windows(hf)
    if len(windows) != hf.num_hidden_layers:
        raise UserError(
            f"{where}: layer_types has {len(windows)} entries for {hf.num_hidden_layers} layers: correct it"
        )
    config = ModelConfig(
        model_type=family.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads or hf.num_attention_heads,
        head_dim=head_dim,
        rms_norm_eps=hf.rms_norm_eps,
        max_position_embeddings=hf.max_position_embeddings,
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        qkv_bias=family.qkv_bias(hf),
        output_bias=family.output_bias(hf),
        mlp_bias=family.mlp_bias(hf),
        qk_norm=family.qk_norm,
        sliding_windows=windows,
        rope_inverse_frequencies=frequencies,
        rope_attention_factor=factor,
        dtype=raw.get("dtype") or raw.get("torch_dtype"),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{where}: num_attention_heads ({config.num_attention_heads}) is not a multiple of num_key_value_heads "
            f"({config.num_key_value_heads}): correct it"
        )
    return config


def _hf_config(model_type: str, raw: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> Any:
    """transformers' config object: its class holds the defaults of fields that the file leaves out."""
    from transformers import CONFIG_MAPPING  # slow to import, and not needed to name a bad flag

    # The old form of the rope fields is understood by transformers 4 and 5 alike, the new one by 5 only.
    plain = {k: v for k, v in raw.items() if k not in ("rope_parameters", "rope_theta", "rope_scaling")}
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    plain["rope_theta"] = rope["rope_theta"]
    plain["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    for name in (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
        "intermediate_size",
    ):
        if not isinstance(raw.get(name), int) or raw[name] <= 0:
            raise UserError(f"{where}: {name} = {raw.get(name)!r}: must be a positive integer")
    try:
        return CONFIG_MAPPING[model_type](**plain)
    except ImportError:  # nothing of the user's: an installation that lacks something, or Ctrl-C while it was imported
        raise
    except Exception as error:
        raise UserError(f"{where}: transformers cannot read it ({error}): correct the field") from None


def _rope_fields(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rotary fields in one form, from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old)."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    given = new if new is not None else old if old is not None else {}
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: rope_{'parameters' if new is not None else 'scaling'} is not an object: correct it")
    fields = dict(given)
    fields["rope_type"] = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields.pop("type", None)
    fields.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    theta = fields["rope_theta"]
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 0:
        raise UserError(f"{where}: rope_theta = {theta!r}: must be a positive number")
    kind = fields["rope_type"]
    if kind not in _ROPE_FIELDS:
        raise UserError(f"{where}: rope_type = {kind!r} is not implemented: megalora knows {', '.join(_ROPE_FIELDS)}")
    for name, value in fields.items():
        if value is not None and name not in _ROPE_FIELDS[kind] | {"rope_type", "rope_theta"}:
            raise UserError(
                f"{where}: rope field {name!r} = {value!r} is not known for rope_type {kind!r} and may change the "
                f"numbers: remove it if it does not"
            )
    return fields


def _rope_frequencies(hf: Any, rope: Mapping, head_dim: int, where: str) -> tuple[tuple[float, ...], float]:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope["rope_type"] == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return tuple((1.0 / (rope["rope_theta"] ** exponents)).tolist()), 1.0
    try:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf, torch.device("cpu"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: rope fields {dict(rope)}: {error!r} is missing or wrong: correct it") from None
    return tuple(frequencies.tolist()), float(factor)


def _refuse_unknown(raw: Mapping[str, Any], hf: Any, where: str) -> None:
    known = set(type(hf)().to_dict()) | _HARMLESS | {"rope_theta", "rope_scaling", "rope_parameters", "head_dim"}
    for name, value in raw.items():
        if name in _FIXED and value is not None and value != _FIXED[name]:
            raise UserError(f"{where}: {name} = {value!r} is not implemented: only {_FIXED[name]!r} is")
        if name not in known and value not in (None, False, 0, "", [], {}):
            raise UserError(
                f"{where}: field {name!r} = {value!r} is unknown for model_type {hf.model_type!r} and may change the "
                f"numbers: remove it if it does not"
            )
    architectures = raw.get("architectures") or []
    for name in architectures if isinstance(architectures, list) else [architectures]:
        if not str(name).endswith("ForCausalLM"):
            raise UserError(f"{where}: architectures names {name}: only a causal language model can be trained")


@dataclass(frozen=True)
class HeadCut:
    """The attention heads of one tp rank: query heads cut as evenly as can be, and the KV heads that they read."""

    query: Part
    kv: Part


def cut_heads(config: ModelConfig, tp: Axis) -> HeadCut:
    """Query head h reads KV head h * K // H; a KV head that several ranks read is held, and trained, by each."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

    def read(rank: int) -> tuple[int, int]:
        first, stop = shard_range(heads, rank, tp.size)
        return first * kv_heads // heads, (stop - 1) * kv_heads // heads + 1

    start, stop = read(tp.rank)
    before = read(tp.rank - 1)[1] if tp.rank else 0
    shared = sum(b - a for a, b in map(read, range(tp.size))) > kv_heads
    return HeadCut(even_part(heads, tp), Part(start, stop, max(start, before), stop, shared))


def check_layout(config: ModelConfig, tp: int, pp: int, uneven_heads: bool = False) -> None:
    """Raises UserError where the model cannot be cut into tp x pp parts, or would be unevenly without being asked."""
    heads = config.num_attention_heads
    if heads % tp and not (uneven_heads and tp <= heads):
        rest = (
            ""
            if tp > heads
            else (f", or give --uneven_heads true: the busiest rank then has {-(-heads // tp)} of {heads} heads")
        )
        raise UserError(
            f"tensor_parallel_size ({tp}) does not divide num_attention_heads ({heads}): "
            f"choose among {', '.join(str(d) for d in range(1, heads + 1) if heads % d == 0)}{rest}"
        )
    if uneven_heads and heads % tp == 0:
        raise UserError(
            f"uneven_heads has no effect: tensor_parallel_size ({tp}) divides num_attention_heads ({heads}); leave "
            f"it out"
        )
    if config.intermediate_size < tp:
        raise UserError(
            f"tensor_parallel_size ({tp}) is more than intermediate_size ({config.intermediate_size}): choose less"
        )
    if config.num_hidden_layers < pp:
        raise UserError(
            f"pipeline_parallel_size ({pp}) is more than num_hidden_layers ({config.num_hidden_layers}): "
            f"choose at most {config.num_hidden_layers}"
        )
