"""What is supported, told by the families themselves: docs/models.md."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from megalora.adapters.targets import DEFAULT_TARGET_MODULES
from megalora.models import rotary
from megalora.models.config import FIXED, known_families, spec_of
from megalora.models.family import Family
from megalora.models.multimodal import unread_parts
from megalora.models.spec import (
    MLP,
    Alibi,
    Attention,
    Disentangled,
    Experts,
    Fused,
    LatentAttention,
    ModelSpec,
    Norm,
    ParallelResidual,
    Projection,
    RecurrentMixer,
    RelativeTable,
    Rotary,
    mixers_of,
)
from megalora.models.tested import AROUND, CELLS, DECODERS, ENCODERS, EXPERTS, FEATURES, IMAGES, PAIRS, cell

_MISSING = {
    "`gemma4_text` of Gemma 4 E2B and E4B": "each layer has vectors of its own for every word, and the last layers "
    "read the keys and values of others",
    "`nemotron_h` with `moe_latent_size` (Nemotron 3 Super)": "its experts read and write a latent of the token",
    "`lfm2_vl`": "an image model around `lfm2`",
    "`sarvam_moe`": "its files hold q, k and v in one linear, of which transformers makes three",
    "`mimo_v2_flash`": "heads of values are narrower than those of keys",
    "`laguna`": "its gates of attention are softplus, and layers differ in their heads",
}
"""Types that are not implemented, and why."""


def summary(family: Family) -> tuple[str, str]:
    """Return (published models, what sets them apart): the first line of the family's module."""
    document = sys.modules[family.read.__module__].__doc__ or ""
    models, _, apart = document.strip().splitlines()[0].rstrip(".").partition(": ")
    return models, apart


def example(family: Family) -> ModelSpec:
    """Return the spec of the family's default config, in transformers where it has one."""
    from transformers import CONFIG_MAPPING

    kind = family.types[0]
    theirs = {} if family.remote or family.inner else CONFIG_MAPPING[family.config_class or kind]().to_dict()
    fields = {**theirs, **family.defaults, **(family.fixed if family.remote else {})}
    fields = {name: value for name, value in fields.items() if value is not None}
    return spec_of(family, fields | {"model_type": kind, **family.example}, f"the default config of {kind}")


def families() -> tuple[Family, ...]:
    """Return every family once, in order of names."""
    return tuple(family for kind, family in sorted(known_families().items()) if kind == family.types[0])


def feature_table() -> list[str]:
    """Return the table of families by features."""
    head = ["model_type", *(feature.name for feature in FEATURES)]
    kinds = [(family.types, kind_of(family)) for family in families()]
    rows = [[_code(types), *(cell(each, types[0], kind) for each in FEATURES)] for types, kind in kinds]
    return _table(head, rows)


def kind_of(family: Family) -> str:
    """Return which of the kinds of megalora.models.tested the models of a family are."""
    spec = example(family)
    if family.inner:
        return AROUND
    if spec.prefix is not None:
        return IMAGES
    if spec.encoder is not None:
        return PAIRS
    if not family.generates:
        return ENCODERS
    return EXPERTS if spec.has_experts else DECODERS


def models_page() -> str:
    """Return docs/models.md."""
    every = ", ".join(f"`{name}` = {_value(value)}" for name, value in FIXED.items())
    columns = ["model_type", "attention", "MLP", "norms", "residual", "linears"]
    parts = [
        "# Supported models",
        "Written by `python -m megalora.models` from `megalora/models/families/`: do not edit this page.",
        "`model_type` is the field of `config.json`. The files are Hugging Face safetensors in bfloat16, float16 or "
        "float32. A field of `config.json` that would change the numbers and is not listed here is refused by name.",
        "\n".join(feature_table()),
        "The features read the model's description, not its name, so that every family has them. The cells say what "
        "the tests run:",
        "\n".join(f"- `{said}`: {what}" for said, what in CELLS.items()),
        "\n".join(_table(["feature", "what it covers", "tested in"], _features())),
        "## Architectures",
        "In the family's default configuration of transformers; what depends on the config is listed below.",
        "\n".join(_table(columns, map(_architecture, families()))),
        "## Each family",
        "The published models that a family names have been read, by their config.json as far as known when this was "
        "written. Of `llama`, `mistral`, `qwen2` and `qwen3`, a tiny model with the same fields has transformers' "
        "logits (`tests/models/test_dense_configs.py`); other decoders have the parameters that they are published "
        "with, cut into tensor 2 x pipeline 4 too (`tests/models/test_classic_configs.py`, "
        "`tests/models/test_real_configs.py`; `gpt2-xl` and `falcon-7b` have an odd number of heads, for which "
        "`--uneven_heads true` is needed); mixtures of experts have as many as transformers' model of the same "
        "config (`tests/models/test_expert_configs.py`); encoders and encoder-decoders have its names and shapes "
        "(`tests/models/test_encoder_configs.py`).",
        f"For every family: {every}. Rope types, unless said otherwise: {_code(rotary.FIELDS)} "
        "(`dynamic` up to `max_position_embeddings` tokens).",
        *("\n".join(_family(family)) for family in families()),
        "## Not implemented",
        "Of types that transformers has and that are often asked for:",
        "\n".join(f"- {models}: {why}." for models, why in _MISSING.items()),
    ]
    return "\n\n".join(parts)


def _features() -> Iterable[list[str]]:
    return ([each.name, each.covers, _code(each.tests) + (" (GPU)" if each.needs_gpu else "")] for each in FEATURES)


def _architecture(family: Family) -> list[str]:
    spec = example(family)
    layer = spec.stack.layers[0]
    of_layers = (mixer for one in spec.stack.layers for mixer in mixers_of(one))
    mixer = next(mixer for mixer in of_layers if isinstance(mixer, MLP | Experts))
    mlp = mixer.expert if isinstance(mixer, Experts) else mixer
    kind = f"{'gated' if mlp.gate is not None else 'plain'}, {mlp.act}"
    parallel = any(isinstance(step, ParallelResidual) for step in layer)
    layers = dict.fromkeys(spec.stack.layers) if spec.recurrent else (layer,)
    names = (linear.name.rpartition(".")[2] for one in layers for mixer in mixers_of(one) for linear in mixer.linears)
    linears = list(dict.fromkeys(names))
    return [
        _code(family.types),
        _attention(family, spec),
        _experts(mixer, kind) if isinstance(mixer, Experts) else kind,
        _norm(spec.norms[0]),
        "parallel" if parallel else "sequential",
        _code(linears),
    ]


def _experts(experts: Experts, kind: str) -> str:
    shared = "" if experts.shared is None else ", and one that all tokens go through"
    return f"the best {experts.router.top} of {experts.count} experts for each token{shared}: {kind}"


def _attention(family: Family, spec: ModelSpec) -> str:
    attention = spec.attention
    if isinstance(attention, LatentAttention):
        queries = "queries too, where q_lora_rank is set" if "q_lora_rank" in family.reads else "queries directly"
        return f"keys and values from one latent a token ({queries})"
    position = attention.position
    grouped = "num_key_value_heads" in family.reads or 1 < attention.kv_heads < attention.heads
    states = [mixer for layer in spec.stack.layers for mixer in mixers_of(layer) if isinstance(mixer, RecurrentMixer)]
    said = ["grouped queries" if grouped else "as many key/value heads as query heads"]
    said = ["one key/value head"] if attention.kv_heads == 1 else said
    said += ["sliding window"] if "sliding_window" in family.reads or _slides(spec) else []
    said += ["attention in chunks, layers without positions"] if spec.chunks else []
    said += [f"{_norm(attention.q_norm)} on q and k"] if attention.q_norm is not None else []
    share = position.size / attention.head_dim if isinstance(position, Rotary) else 1
    said += [f"{share:.0%} of each head rotates"] if share < 1 else []
    said += ["ALiBi"] if isinstance(position, Alibi) else []
    said += ["relative positions by a table"] if isinstance(position, RelativeTable) else []
    said += ["scores of content against position"] if isinstance(position, Disentangled) else []
    said += ["cross attention in the decoder"] if spec.encoder is not None else []
    said += ["learned positions"] if spec.embedding.positions is not None else []
    said += ["a gate on each head"] if attention.gate is not None else []
    said += ["q k v in one linear"] if attention.gate is None and _is_fused(attention.q) else []
    said += [f"{len(states)} of {spec.num_hidden_layers} {states[0].told}"] if states else []
    return ", ".join(said)


def _slides(spec: ModelSpec) -> bool:
    return any(isinstance(mixer, Attention) and mixer.window is not None for mixer in spec.mixers)


def _is_fused(projection: Projection | None) -> bool:
    return isinstance(projection, Fused)


def _norm(norm: Norm) -> str:
    return {"rms": "RMSNorm", "layer": "LayerNorm"}[norm.kind] + ("" if norm.weighted else " without weights")


def _family(family: Family) -> Iterable[str]:
    models, apart = summary(family)
    spec, kind = example(family), family.types[0]
    targets = DEFAULT_TARGET_MODULES.get(kind)
    yield f"### {kind}\n"
    yield f"{models}: {apart}.\n"
    yield f"- Default `target_modules`: {_code(targets) if targets else 'none, so `lora_config.json` must name them'}."
    yield f"- Reads {_code(sorted(family.reads))}{', and the rope fields' if family.rotates else ''}."
    if not family.generates:
        seen = "its whole document" + (", in some layers a window on both sides of it" if _slides(spec) else "")
        yield f"- Every token sees {seen}. Tasks: {_code(spec.tasks)}, see [tasks.md](tasks.md)."
    if spec.prefix is not None:
        yield "- Reads an image before each text, see [images.md](images.md): its vision tower and Q-Former are frozen."
    if family.inner:
        parts = _code(unread_parts(spec))
        yield f"- Its language model is used, on text only. Image parts ({parts}) are not loaded; convert copies them."
        texts = _code([kind for kind in family.inner.values() if kind not in family.inner])
        yield f"- `text_config` is of {_code(family.inner)}" + (f", and read as that of {texts}." if texts else ".")
    if spec.encoder is not None:
        yield f"- An encoder-decoder. Tasks: {_code(spec.tasks)}, see [tasks.md](tasks.md)."
    if isinstance(family.partial, tuple):
        yield f"- `partial_rotary_factor` is `{' / '.join(family.partial)}` unless the config has it."
    elif family.partial is not None:
        yield f"- `partial_rotary_factor` is {family.partial:g} unless the config has it."
    if family.scaled:
        yield "- Made with scaled rotations: a config.json without `rope_scaling` or `rope_parameters` is refused."
    if family.rope_default is not None:
        yield f"- Rope fields of a config.json without any: {_value(dict(family.rope_default))}."
    if family.rope:
        yield f"- Rope fields of its own: {_renamed(family.rope)}."
    if family.remote:
        yield "- `auto_map` of its config.json names remote code, which is not run: this is megalora's own."
    if family.rope_reads:
        yield f"- Reads of the rope fields {_code(sorted(family.rope_reads))} too."
    if family.rope_harmless:
        yield f"- Rope fields without effect: {_code(sorted(family.rope_harmless))}."
    if family.aliases:
        yield f"- Other names of fields: {_renamed(family.aliases)}."
    if family.fixed:
        yield f"- The only values that are implemented: {_fixed(family.fixed)}."
    if family.harmless:
        yield f"- Has no effect on training: {_code(sorted(family.harmless))}."
    if family.published:
        yield f"- Published models that are read: {', '.join(family.published)}."
    for name, why in family.refused.items():
        yield f"- {name} is refused: {why}."
    head = f"{spec.head.names[0]}.weight"
    layers = spec.stack.prefix if spec.encoder is None else f"{spec.encoder.prefix}.N`, `{spec.stack.prefix}"
    yield f"- Names: layers `{layers}.N`, embedding `{spec.embedding.weight}`, head `{head}`."
    if family.files.prefix:
        yield f"- Files without the prefix `{family.files.prefix}` are read too."
    for start, ours in family.files.renames:
        yield f"- `{start}…` in a file is read as `{ours}…`."


def _renamed(names: Mapping[str, str]) -> str:
    return ", ".join(f"`{theirs}` is `{ours}`" for theirs, ours in names.items())


def _fixed(fixed: Mapping[str, object]) -> str:
    return ", ".join(f"`{name}` = {_value(value)}" for name, value in sorted(fixed.items()))


def _value(value: object) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
