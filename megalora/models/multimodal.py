"""The language model of a model that reads images too (Gemma 3, Mistral Small 3.1, Qwen-VL): used on text only.

Such a config.json has the language model's in `text_config`, and its files the weights of both. The parts that read
images are not read: a text without images goes through the language model as if they were not there. convert copies
them to the models that it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

from megalora.models.config import config_from_dict
from megalora.models.family import Family, Fields
from megalora.models.nested import renamed
from megalora.models.spec import FileNames, ModelSpec

_SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size")
_OF_IMAGES = frozenset(
    """vision_config image_token_id image_token_index video_token_id vision_start_token_id vision_end_token_id
    vision_token_id initializer_range""".split()
)
_SECTIONS = ("mrope_section", "mrope_interleaved")  # of the features that turn by time, height and width
LLAVA_FILES = FileNames(  # as transformers writes LLaVA and those that are made like it
    renames=(("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head.")),
    beside=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)


def multimodal_family(
    kind: str,
    read: Callable[[Fields], ModelSpec],
    texts: Mapping[str, str],
    harmless: frozenset[str] = frozenset(),
    flat: bool = False,
    published: tuple[str, ...] = (),
) -> Family:
    """Return the family of models around a language model, which `read` reads by `text_of`.

    kind      the model_type
    texts     model_type of text_config -> the family's that reads it
    harmless  fields of the parts that are not read, beside those that all have
    flat, published  as Family has them
    """
    return Family(
        (kind,),
        read,
        reads=frozenset({"text_config", "tie_word_embeddings"}),
        harmless=_OF_IMAGES | harmless,
        rotates=False,
        inner=texts,
        flat=flat,
        published=published,
        example={"text_config": {"model_type": next(iter(texts))}},
        architectures=frozenset({"ForConditionalGeneration"}),
    )


def _beside_the_head(name: str) -> str:
    """Return a name where the larger model has the head, and its `model` all else."""
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def text_of(
    hf: Fields,
    texts: Mapping[str, str],
    files: FileNames,
    ours: Callable[[str], str] = _beside_the_head,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    ties: Literal["outer", "text", "either"] = "outer",
) -> ModelSpec:
    """Return the language model with the names that it has in the larger one. Raises UserError as `config_from_dict`.

    texts     as `multimodal_family` takes them
    files     how names in its files differ from ours; its `beside` are the parts that are not read
    ours      a name of the language model alone -> its name in the larger one
    defaults  of fields of text_config where they differ from those of the family that reads it
    ties      whose tie_word_embeddings counts in transformers 5, which writes one beside text_config: that one, that of
              text_config, or either that is true. Without one beside it (transformers 4) text_config's counts
    """
    text = dict(hf.text_config)
    kind = text.get("model_type", next(iter(texts)))
    if kind not in texts:
        hf.fail(
            f"text_config.model_type = {kind!r} is not implemented",
            f"take a model whose text_config is of {' or '.join(texts)}",
        )
    fields = {**_left_out(texts[kind]), **defaults, **text, "model_type": texts[kind]}
    if ties == "outer" and hf.tie_word_embeddings is not None or ties == "either" and hf.tie_word_embeddings:
        fields["tie_word_embeddings"] = hf.tie_word_embeddings
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(fields.get(name), Mapping):
            fields[name] = _of_one_axis(fields[name])
            for own in ("rope_theta", "partial_rotary_factor"):
                if own in fields[name] and own not in text:
                    fields.pop(own, None)  # the default
    spec = config_from_dict(fields, f"{hf.where}: text_config")
    return replace(renamed(spec, ours), files=files)


def _left_out(kind: str) -> dict[str, Any]:
    """Return the sizes that a text_config may leave out, as published ones do: those of transformers' class."""
    from transformers import CONFIG_MAPPING

    fields = CONFIG_MAPPING[kind]().to_dict()
    return {name: fields[name] for name in _SIZES if name in fields}


def _of_one_axis(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope fields without what tells time, height and width apart: in a text the three are the same."""
    fields = {name: value for name, value in rope.items() if name not in _SECTIONS}
    return {name: "default" if value == "mrope" else value for name, value in fields.items()}


def unread_parts(spec: ModelSpec) -> tuple[str, ...]:
    """Return the names of the parts of a larger model that are not read, as published files have them."""
    return tuple(dict.fromkeys(start.removeprefix("model.").removesuffix(".") for start in spec.files.beside))


def unread_note(spec: ModelSpec, folder: str) -> str | None:
    """Return a line on the parts of a model that are not read; None where there are none."""
    parts = unread_parts(spec)
    if not parts:
        return None
    return (
        f"{folder}: the language model of this {spec.model_type} is used, on text only: its image parts "
        f"({', '.join(parts)}) are not loaded"
    )
