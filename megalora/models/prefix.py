"""A frozen prefix, as data: what turns an image into the vectors of a few tokens before a text. No torch here.

transformers' own classes run it (blocks/prefix.py), on the first pipeline stage; fields and names are theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Tensors = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class VisionTower:
    """A vision transformer over patches, as transformers' Blip2VisionConfig describes one."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    qkv_bias: bool

    def tensors(self) -> Tensors:
        """Yield the name and shape of each tensor in the file, below the tower's own name."""
        size, inner, at = self.hidden_size, self.intermediate_size, "embeddings"
        yield f"{at}.class_embedding", (1, 1, size)
        yield f"{at}.position_embedding", (1, (self.image_size // self.patch_size) ** 2 + 1, size)
        yield f"{at}.patch_embedding.weight", (size, 3, self.patch_size, self.patch_size)
        yield f"{at}.patch_embedding.bias", (size,)
        for layer in range(self.num_hidden_layers):
            at = f"encoder.layers.{layer}"
            yield f"{at}.self_attn.qkv.weight", (3 * size, size)
            if self.qkv_bias:
                yield f"{at}.self_attn.qkv.bias", (3 * size,)
            yield from _linear(f"{at}.self_attn.projection", size, size)
            yield from _norm(f"{at}.layer_norm1", size)
            yield from _linear(f"{at}.mlp.fc1", size, inner)
            yield from _linear(f"{at}.mlp.fc2", inner, size)
            yield from _norm(f"{at}.layer_norm2", size)
        yield from _norm("post_layernorm", size)


@dataclass(frozen=True)
class QFormer:
    """Queries that read the vision tower, as transformers' Blip2QFormerConfig describes them."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    cross_attention_frequency: int
    encoder_hidden_size: int

    def tensors(self) -> Tensors:
        """Yield the name and shape of each tensor in the file, below its own name."""
        size, inner = self.hidden_size, self.intermediate_size
        yield from _norm("layernorm", size)
        for layer in range(self.num_hidden_layers):
            at, sources = f"encoder.layer.{layer}", {"attention": size}
            if layer % self.cross_attention_frequency == 0:
                sources["crossattention"] = self.encoder_hidden_size
            for name, source in sources.items():
                yield from _linear(f"{at}.{name}.attention.query", size, size)
                yield from _linear(f"{at}.{name}.attention.key", source, size)
                yield from _linear(f"{at}.{name}.attention.value", source, size)
                yield from _linear(f"{at}.{name}.output.dense", size, size)
                yield from _norm(f"{at}.{name}.output.LayerNorm", size)
            yield from _linear(f"{at}.intermediate_query.dense", size, inner)
            yield from _linear(f"{at}.output_query.dense", inner, size)
            yield from _norm(f"{at}.output_query.LayerNorm", size)


@dataclass(frozen=True)
class ImagePrefix:
    """language_projection(qformer(query_tokens, vision_model(image))): the vectors of `tokens` tokens.

    They take the places of as many tokens `placeholder` at the start of a document, as in transformers 5, where the
    words are looked up: what the embedding adds to words is added to them too.
    """

    vision: VisionTower
    qformer: QFormer
    tokens: int
    placeholder: int
    out_features: int

    def tensors(self) -> Tensors:
        """Yield the name and shape of each tensor in the file."""
        for name, part in (("vision_model", self.vision), ("qformer", self.qformer)):
            yield from ((f"{name}.{own}", shape) for own, shape in part.tensors())
        yield "query_tokens", (1, self.tokens, self.qformer.hidden_size)
        yield from _linear("language_projection", self.qformer.hidden_size, self.out_features)

    @staticmethod
    def is_wide(name: str) -> bool:
        """Return whether a tensor stays in float32 whatever the compute dtype is, as transformers keeps it."""
        return name == "query_tokens" or name.startswith("qformer.")


def _linear(name: str, inputs: int, outputs: int) -> Tensors:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, size: int) -> Tensors:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)
