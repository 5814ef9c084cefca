"""A language model within a larger one: its spec with the names that it has there."""

from __future__ import annotations

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
    """Return a language model whose names begin with `name`, behind a prefix; it has that head alone.

    Names of a layer are relative to it, so that those of the ends change, and of what layers share.
    """
    stack, head, encoder = spec.stack, spec.head, spec.encoder
    assert isinstance(head, Head)

    def norm(one: Norm | None) -> Norm | None:
        return one and replace(one, name=name + one.name)

    def embedding(one: Embedding) -> Embedding:
        assert one.types is None and one.boxes is None and one.project is None, one
        positions = one.positions and replace(one.positions, name=name + one.positions.name)
        return replace(one, name=name + one.name, positions=positions, norm=norm(one.norm))

    def mixer(one: Mixer) -> Mixer:
        if isinstance(one, Attention) and isinstance(one.position, RelativeTable):
            return replace(one, position=replace(one.position, name=name + one.position.name))
        return one

    def layer(one: Layer) -> Layer:
        assert all(isinstance(step, Residual) for step in one), one
        return tuple(replace(step, mixer=mixer(step.mixer)) for step in one)  # type: ignore[arg-type, union-attr]

    if encoder is not None:
        encoder = replace(
            encoder,
            prefix=name + encoder.prefix,
            embedding=embedding(encoder.embedding),
            final_norm=norm(encoder.final_norm),
        )
    layers = {one: layer(one) for one in set(stack.layers)}
    bias_row = head.bias_row and name + head.bias_row
    project = head.project and replace(head.project, name=name + head.project.name)
    return replace(
        spec,
        embedding=embedding(spec.embedding),
        stack=replace(
            stack,
            prefix=name + stack.prefix,
            layers=tuple(layers[one] for one in stack.layers),
            final_norm=norm(stack.final_norm),
            encoder=encoder,
        ),
        head=replace(head, name=name + head.name, bias_row=bias_row, project=project),
        files=_files(spec.files, name),
        task_heads=(),
        prefix=prefix,
    )


def _files(files: FileNames, name: str) -> FileNames:
    return replace(
        files,
        renames=tuple((name + start, name + ours) for start, ours in files.renames),
        ignored=(*files.ignored, "embeddings.position_ids"),
        prefix="",
        passed=tuple(name + start for start in files.passed),
    )
