"""A language model within a larger one: its spec with the names that it has there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megalora.models.prefix import ImagePrefix
from megalora.models.spec import (
    Attention,
    Embedding,
    FileNames,
    Head,
    Layer,
    Mixer,
    ModelSpec,
    Norm,
    RelativeTable,
    Residual,
)


def below(spec: ModelSpec, name: str, prefix: ImagePrefix) -> ModelSpec:
    """Return a language model whose names begin with `name`, behind a prefix; it has that head alone."""
    files = replace(
        spec.files,
        renames=tuple((name + start, name + ours) for start, ours in spec.files.renames),
        ignored=(*spec.files.ignored, "embeddings.position_ids"),
        prefix="",
        passed=tuple(name + start for start in spec.files.passed),
    )
    return replace(renamed(spec, lambda own: name + own), files=files, prefix=prefix)


def renamed(spec: ModelSpec, ours: Callable[[str], str]) -> ModelSpec:
    """Return the spec with other names: `ours` of a full name. It has its own head alone, and no names of files.

    Names of a layer are relative to it, so that those of the ends change, and of what layers share.
    """
    stack, head, encoder = spec.stack, spec.head, spec.encoder
    assert isinstance(head, Head)

    def norm(one: Norm | None) -> Norm | None:
        return one and replace(one, name=ours(one.name))

    def embedding(one: Embedding) -> Embedding:
        assert one.types is None and one.boxes is None and one.project is None, one
        positions = one.positions and replace(one.positions, name=ours(one.positions.name))
        return replace(one, name=ours(one.name), positions=positions, norm=norm(one.norm))

    def mixer(one: Mixer) -> Mixer:
        if isinstance(one, Attention) and isinstance(one.position, RelativeTable):
            return replace(one, position=replace(one.position, name=ours(one.position.name)))
        return one

    def layer(one: Layer) -> Layer:
        assert all(isinstance(step, Residual) for step in one), one
        return tuple(replace(step, mixer=mixer(step.mixer)) for step in one)  # type: ignore[arg-type, union-attr]

    if encoder is not None:
        encoder = replace(
            encoder,
            prefix=ours(encoder.prefix),
            embedding=embedding(encoder.embedding),
            final_norm=norm(encoder.final_norm),
        )
    layers = {one: layer(one) for one in set(stack.layers)}
    bias_row = head.bias_row and ours(head.bias_row)
    project = head.project and replace(head.project, name=ours(head.project.name))
    return replace(
        spec,
        embedding=embedding(spec.embedding),
        stack=replace(
            stack,
            prefix=ours(stack.prefix),
            layers=tuple(layers[one] for one in stack.layers),
            final_norm=norm(stack.final_norm),
            encoder=encoder,
        ),
        head=replace(head, name=ours(head.name), bias_row=bias_row, project=project),
        files=FileNames(),
        task_heads=(),
    )
