"""A model's config.json, read through transformers, checked so that nothing in it is silently ignored."""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalora.errors import UserError
from megalora.files import read_json
from megalora.models import families, rotary
from megalora.models.bounds import BOUNDS
from megalora.models.family import Family, Fields, RemoteConfig, check_field
from megalora.models.quantisation import stored_format
from megalora.models.spec import (
    MLP,
    Attention,
    CrossAttention,
    DeltaAttention,
    Experts,
    FileNames,
    LatentAttention,
    ModelSpec,
    RecurrentMixer,
    StateSpace,
)
from megalora.parallel.mesh import Axis
from megalora.parallel.split import cut_heads

# Fields that say nothing about the numbers of a training step, beside those of transformers' own base config.
HARMLESS = frozenset(
    """_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
    architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype dual_chunk_attention_config
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range internal_version is_decoder is_llama_config
    label2id length_penalty max_length max_sequence_length min_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    quantization_config tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache""".split()
)
# Fields with the one value at which they do not change the numbers, whatever the family.
FIXED: Mapping[str, Any] = {"is_encoder_decoder": False, "add_cross_attention": False, "is_causal": True}
# Ends of the classes of transformers that differ in the head alone, which the task decides.
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForTokenClassification", "ForSequenceClassification")
_EMPTY: tuple[Any, ...] = (None, False, "", [], {})  # values of a field that say nothing
_SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size")


@functools.cache
def known_families() -> Mapping[str, Family]:
    """Return every Family in `megalora.models.families`, by model_type."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(families.__path__):
        family = importlib.import_module(f"{families.__name__}.{module.name}").FAMILY
        found |= dict.fromkeys(family.types, family)
    return found


def read_config(path: str | Path) -> ModelSpec:
    """Return the ModelSpec of an HF folder, or of a config.json itself.

    Raises UserError that names file and field: for a missing or broken file, an unknown model_type, and any field that
    would change the numbers and is not implemented.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"model_path {path}: does not exist", "name a Hugging Face folder")
    raw = read_json(file, "name a Hugging Face folder, or download it again", what="model_path")
    return config_from_dict(raw, str(file))


def reads_images(raw: Mapping[str, Any]) -> bool:
    """Return whether the fields of a config.json are of a model that reads an image before each text."""
    kind = raw.get("model_type")
    family = known_families().get(kind) if isinstance(kind, str) else None
    return family is not None and "vision_config" in family.reads


def is_encoder_decoder(raw: Mapping[str, Any]) -> bool:
    """Return whether the fields of a config.json are of an encoder-decoder that is implemented."""
    kind, inner = raw.get("model_type"), raw.get("text_config")
    family = known_families().get(kind) if isinstance(kind, str) else None
    if family is not None and "text_config" in family.reads and isinstance(inner, Mapping):
        return is_encoder_decoder(inner)
    return family is not None and family.fixed.get("is_encoder_decoder") is True


def config_from_dict(raw: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """Return the ModelSpec of the fields of a config.json, in its old or new form. Raises UserError as read_config."""
    kinds, model_type = known_families(), raw.get("model_type")
    family = kinds.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        near = difflib.get_close_matches(str(model_type), kinds, n=3) or ["llama", "qwen2", "deepseek_v3"]
        raise UserError(
            f"{where}: model_type = {model_type!r} is not implemented",
            f"take a model of a type that docs/models.md lists, such as {', '.join(near)}",
        )
    return spec_of(family, raw, where)


def spec_of(family: Family, raw: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """Return the ModelSpec that `family` reads from the fields of a config.json. Raises UserError as `read_config`."""
    raw = {name: _decoded(value) for name, value in raw.items()}
    raw = _with_text_config(family.in_our_names(raw, where), family)
    partial = family.partial_of(raw, where)
    unsaid = all(raw.get(name) is None for name in ("rope_parameters", "rope_scaling"))
    if family.rope_default is not None and unsaid:
        raw = {**raw, "rope_parameters": family.rope_default}
    if family.scaled and unsaid:
        said = f"{where}: has no rope_scaling, which this model is made with"
        raise UserError(said, "take config.json from the model's own folder")
    own = family.rope_reads, family.rope_harmless
    rope = rotary.read_rope(raw, family.rope, partial, where, family.theta, *own)
    hf = _hf_config(raw, family, rope, where)
    _refuse_unread(raw, hf, family, where)
    sliding = rotary.read_sliding_rope(raw, family.sliding_theta, partial, where)
    spec = family.read(Fields(hf, family, rope, where, sliding))
    if any(getattr(mixer, "window", None) == 0 for mixer in spec.mixers):
        raise UserError(f"{where}: sliding_window = 0 is not valid", "give the tokens of a window, or null for none")
    if rope["rope_type"] != "default" and not (family.rotates and spec.rotaries):
        kind, why = rope["rope_type"], "takes no rope fields" if spec.rotaries else "has no rotary positions"
        raise UserError(f"{where}: rope_type = {kind!r}, but this model {why}", "remove it")
    if not family.rotates and rope["rope_theta"] != family.theta:
        why = "turns by 10000 always" if spec.rotaries else "has no rotary positions"
        raise UserError(f"{where}: rope_theta = {rope['rope_theta']!r}, but this model {why}", "remove it")
    dtype = raw.get("dtype") or raw.get("torch_dtype") or spec.dtype
    further = range(spec.num_hidden_layers, spec.num_hidden_layers + spec.predicting)
    passed = tuple(spec.stack.of_layer(index, "") for index in further)
    files = family.files if spec.files == FileNames() else spec.files  # of a model within another
    longest = int(min(rotary.extended_length(rope, spec.max_position_embeddings), _undivided_length(raw, where)))
    return replace(
        spec,
        model_type=raw["model_type"],
        dtype=dtype,
        stored=stored_format(raw, where),
        files=replace(files, passed=(*files.passed, *passed)),
        max_position_embeddings=longest,
    )


def _decoded(value: Any) -> Any:
    """Return a field with its floats: transformers 5 writes an infinite one as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    if isinstance(value, Mapping) and value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity"):
        return float(value["__float__"])
    return value


def _with_text_config(raw: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """Return the fields with those of an inner language model in text_config, where an old file has them beside it."""
    if not family.flat or "text_config" in raw:
        return raw
    outer = {*HARMLESS, *FIXED, *family.harmless, *family.reads}
    text = {name: value for name, value in raw.items() if name not in outer}
    return {**{name: value for name, value in raw.items() if name in outer}, "text_config": text}


def _undivided_length(raw: Mapping[str, Any], where: str) -> float:
    """Return the tokens up to which dual chunk attention is plain attention, as transformers computes it always."""
    fields = raw.get("dual_chunk_attention_config")
    if fields is None:
        return math.inf
    length = fields.get("original_max_position_embeddings") if isinstance(fields, Mapping) else None
    if not isinstance(length, int) or isinstance(length, bool) or length <= 0:
        raise UserError(
            f"{where}: dual_chunk_attention_config does not say its original_max_position_embeddings, below which it "
            "changes nothing",
            "take config.json from the model's own folder, or remove the field",
        )
    return length


def check_length(spec: ModelSpec, seq_length: int, flag: str = "seq_length") -> str | None:
    """Return a line for the user where documents may be longer than the model is made for; None where not.

    flag  that says how long they may be

    Raises UserError where the model has no positions beyond.
    """
    longest = spec.max_position_embeddings
    if seq_length <= longest:
        return None
    if spec.embedding.positions is not None:
        raise UserError(
            f"{flag} ({seq_length}) is more than the model's max_position_embeddings ({longest}), and it has no "
            "positions beyond",
            "choose at most that",
        )
    if any(rotary.only_to is not None for rotary in spec.rotaries):
        raise UserError(
            f"{flag} ({seq_length}) is more than the model's max_position_embeddings ({longest}), beyond which "
            "rope_type dynamic turns by the length of each text, which is not implemented",
            "choose at most that, or extend the model with rope_type yarn or linear in config.json",
        )
    return (
        f"{flag} ({seq_length}) is more than the {longest} tokens that the model is made for: replies to longer "
        f"texts may be poor, unless rope_scaling in config.json extends them"
    )


def _hf_config(raw: Mapping[str, Any], family: Family, rope: Mapping[str, Any], where: str) -> Any:
    """Return transformers' config object: its class holds the defaults of fields that the file leaves out."""
    import transformers  # slow to import, and not needed to name a bad flag
    from transformers import CONFIG_MAPPING

    kind = None if family.remote or family.inner else family.config_class or raw["model_type"]
    if kind is not None and kind not in CONFIG_MAPPING:
        said = f"{where}: model_type = {raw['model_type']!r} is not known to transformers {transformers.__version__}"
        raise UserError(said, "install a newer one: pip install -U transformers")
    kind = None if kind is None else CONFIG_MAPPING[kind]
    names = getattr(kind, "attribute_map", {})  # of fields, ours -> the file's
    for ours, theirs in names.items():
        if ours in raw and theirs in raw and raw[ours] != raw[theirs]:
            said = f"{theirs} = {raw[theirs]!r} and {ours} = {raw[ours]!r} are one field"
            raise UserError(f"{where}: {said}", "keep one of them")
    for field in sorted(family.reads):  # before transformers makes lists as long as numbers say
        name = field if field in raw else names.get(field, field)
        if raw.get(name) is None and field in _SIZES and field not in family.optional:
            raise UserError(f"{where}: {name} = None is not valid", f"give {BOUNDS[field].told}")
        check_field(field, raw.get(name), where, name)
    if kind is None:
        return RemoteConfig(family.defaults, raw)
    # The old form of the rope fields is understood by transformers 4 and 5 alike, the new one by 5 only.
    plain = {k: v for k, v in raw.items() if k not in rotary.CONFIG_FIELDS and family.rope.get(k) != "rope_theta"}
    plain.pop("num_labels", None)  # of which it would make a list of as many names
    newer = rope["rope_type"] == "proportional"  # which only transformers 5 has, whose check wants the theta with it
    scaling = {k: v for k, v in rope.items() if k != "rope_theta" or newer}
    theta = next((alias for alias, ours in family.rope.items() if ours == "rope_theta"), "rope_theta")
    if family.rotates:
        plain[theta] = rope["rope_theta"]
        plain["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    try:
        made = kind(**{**family.defaults, **plain})
        if "per_layer_config" in made.to_dict():  # the family knows which layers have sizes of their own
            made.allow_global_per_layer_attribute_access = True
        return made
    except ImportError:  # nothing of the user's: an installation that lacks something, or Ctrl-C while it was imported
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(f"{where}: transformers cannot read it ({said})", "correct the field") from None


def _refuse_unread(raw: Mapping[str, Any], hf: Any, family: Family, where: str) -> None:
    """Raise UserError for a field, of the file or a default of transformers' class, that nothing accounts for."""
    from transformers import PretrainedConfig

    passed_over = {*HARMLESS, *family.harmless, *rotary.CONFIG_FIELDS, *family.rope, *family.reads}
    passed_over |= {theirs for ours, theirs in getattr(hf, "attribute_map", {}).items() if ours in family.reads}
    passed_over |= {"partial_rotary_factor"} if family.partial is not None else set()
    passed_over |= {family.sliding_theta[0]} if family.sliding_theta is not None else set()
    fixed = {name: value for name, value in {**FIXED, **family.fixed}.items() if name not in family.reads}
    values = {**hf.to_dict(), **{k: v for k, v in raw.items() if v is not None}}
    general = set(PretrainedConfig().to_dict()) - raw.keys()
    for name, value in values.items():
        if name in fixed:
            if value is not None and value != fixed[name]:
                said = f"{where}: {name} = {value!r} is not implemented"
                raise UserError(said, f"take a model with {name} = {fixed[name]!r}")
        elif name in passed_over or name in general or name.startswith("_"):
            continue
        elif not any(value is empty or value == empty for empty in _EMPTY):
            given = "" if name in raw else " (transformers' default)"
            raise UserError(
                f"{where}: field {name!r} = {value!r}{given} is not read for model_type {raw['model_type']!r} and may "
                "change the numbers",
                "remove it if it does not",
            )
    architectures = raw.get("architectures") or []
    for name in architectures if isinstance(architectures, list) else [architectures]:
        if not str(name).endswith((*_DECODERS, *family.architectures)):
            raise UserError(
                f"{where}: architectures names {name}, whose mathematics is not implemented",
                f"take a folder of {raw['model_type']} with another head, or correct the field",
            )


def check_writes_text(config: ModelSpec, model_path: str, hint: str) -> None:
    """Raise UserError, with this hint, where a model has no head that writes text."""
    if not {"CAUSAL_LM", "SEQ_2_SEQ_LM"} & {*config.tasks}:
        raise UserError(f"model_path {model_path}: {config.model_type} writes no text", hint)


def check_task(task: str, config: ModelSpec, where: str) -> None:
    """Raise UserError where a model cannot be trained for a task."""
    if task not in config.tasks:
        raise UserError(
            f"{where}: task_type {task}{' (the default)' * (task == 'CAUSAL_LM')} does not fit model_type "
            f"{config.model_type}",
            f"give {' or '.join(config.tasks)} as task_type, or take another model",
        )


def check_context(config: ModelSpec, cp: int, task: str) -> None:
    """Raise UserError where documents cannot be cut over cp ranks: attention must be causal, with plain scores."""
    if cp == 1:
        return
    what = None
    if config.encoder is not None:
        what = "an encoder-decoder"
    elif task != "CAUSAL_LM":
        what = f"task_type {task}"
    for mixer in config.mixers:
        if isinstance(mixer, Attention | LatentAttention) and not getattr(mixer, "causal", True):
            what = "attention that is not causal"
        elif isinstance(mixer, Attention) and mixer.softcap is not None:
            what = "attention with softcap"
        elif isinstance(mixer, Attention) and mixer.chunk is not None:
            what = "attention in chunks"
        elif isinstance(mixer, Attention) and mixer.dropout:
            what = "dropout of attention's probabilities (--base_dropout false switches it off)"
        elif isinstance(mixer, RecurrentMixer):
            what = f"{mixer.told}, which would wait for the tokens of other ranks"
    if any(rotary.long is not None for rotary in config.rotaries):
        what = "rope type longrope, which depends on the length of the document"
    if what is not None:
        raise UserError(f"context_parallel_size ({cp}) is not implemented for {what}", "leave it out")


def check_layout(config: ModelSpec, tp: int, pp: int, uneven_heads: bool = False) -> None:
    """Raise UserError where the model cannot be cut into tp x pp parts, or would be unevenly without being asked."""
    attentions = [m for m in config.mixers if isinstance(m, Attention | CrossAttention | LatentAttention)]
    counts = [("num_attention_heads", mixer.heads) for mixer in attentions]
    counts += [("linear_num_key_heads", m.groups) for m in config.mixers if isinstance(m, DeltaAttention)]
    counts += [("the heads of Mamba-2", m.heads) for m in config.mixers if isinstance(m, StateSpace)]
    of_all = "num_attention_heads", config.num_attention_heads
    name, heads = next((pair for pair in counts if pair[1] % tp), of_all)
    inner = min((mixer.inner for mixer in config.mixers if isinstance(mixer, MLP)), default=tp)
    if heads % tp and not (uneven_heads and tp <= heads):
        rest = (
            ""
            if tp > heads
            else (f", or give --uneven_heads true: the busiest rank then has {-(-heads // tp)} of {heads} heads")
        )
        raise UserError(
            f"tensor_parallel_size ({tp}) does not divide {name} ({heads})",
            f"choose among {', '.join(str(d) for d in range(1, heads + 1) if heads % d == 0)}{rest}",
        )
    if uneven_heads and heads % tp == 0:
        raise UserError(
            f"uneven_heads has no effect: tensor_parallel_size ({tp}) divides {name} ({heads})",
            "leave it out",
        )
    if inner < tp:
        raise UserError(
            f"tensor_parallel_size ({tp}) is more than intermediate_size ({inner})", f"choose at most {inner}"
        )
    for mixer in config.mixers:
        if isinstance(mixer, StateSpace) and not _cut_by_groups(mixer, tp):
            raise UserError(
                f"tensor_parallel_size ({tp}) cuts the {mixer.heads} heads of Mamba-2 so that a rank has unlike parts "
                f"of its {mixer.groups} groups",
                f"choose a divisor or a multiple of {mixer.groups} that divides {mixer.heads}",
            )
    fewest = min((mixer.count for mixer in config.mixers if isinstance(mixer, Experts)), default=tp)
    if fewest < tp:
        raise UserError(
            f"tensor_parallel_size ({tp}) is more than the number of experts ({fewest}), of which each rank holds "
            "whole ones",
            f"choose at most {fewest}",
        )
    if config.num_hidden_layers < pp:
        raise UserError(
            f"pipeline_parallel_size ({pp}) is more than num_hidden_layers ({config.num_hidden_layers})",
            f"choose at most {config.num_hidden_layers}",
        )


def _cut_by_groups(mixer: StateSpace, tp: int) -> bool:
    """Return whether as many heads of each rank read each of its groups, in order."""
    for rank in range(tp):
        cut = cut_heads(mixer.heads, mixer.groups, Axis(rank, tuple(range(tp))))
        each = cut.query.size // cut.kv.size
        own = range(cut.query.start, cut.query.stop)
        if any(head * mixer.groups // mixer.heads - cut.kv.start != i // each for i, head in enumerate(own)):
            return False
    return True
