"""The dropouts that a model's config asks for in training (beside the adapters' own), and a model without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megalora.errors import UserError
from megalora.models.spec import MLP, Attention, CrossAttention, Layer, ModelSpec, Residual


def base_dropouts(config: ModelSpec) -> Mapping[str, float]:
    """Return the largest probability of each kind of dropout: "embedding", "residual" and so on; none that is 0."""
    steps = [step for layer in dict.fromkeys(config.stack.layers) for step in layer]
    branches = [branch for step in steps for branch in step.branches]
    mixers = [branch.mixer for branch in branches]
    attentions = [mixer for mixer in mixers if isinstance(mixer, Attention | CrossAttention)]
    found = {
        "embedding": config.embedding.dropout,
        "residual": max((step.dropout for step in (*steps, *branches)), default=0.0),
        "attention": max((mixer.dropout for mixer in attentions), default=0.0),
        "inside MLPs": max((mixer.dropout for mixer in mixers if isinstance(mixer, MLP)), default=0.0),
        "behind the last norm": config.stack.dropout,
    }
    return {kind: p for kind, p in found.items() if p > 0}


def told(dropouts: Mapping[str, float]) -> str:
    """Return the dropouts in words."""
    return ", ".join(f"{kind} {p:g}" for kind, p in dropouts.items())


def without_base_dropout(config: ModelSpec) -> ModelSpec:
    """Return the model without its dropouts."""
    layers = {layer: _without(layer) for layer in set(config.stack.layers)}
    encoder = config.encoder
    if encoder is not None:
        encoder = replace(encoder, embedding=replace(encoder.embedding, dropout=0.0), dropout=0.0)
    stack = replace(
        config.stack,
        layers=tuple(layers[layer] for layer in config.stack.layers),
        dropout=0.0,
        encoder=encoder,
    )
    return replace(config, embedding=replace(config.embedding, dropout=0.0), stack=stack)


def choose_base_dropout(config: ModelSpec, wanted: bool | None) -> ModelSpec:
    """Return the model as it is trained. wanted: the flag base_dropout; None: not given, so as the config asks.

    Raises UserError where the flag is given and the config asks for no dropout.
    """
    if wanted is not None and not base_dropouts(config):
        raise UserError(
            f"base_dropout has no effect: the config.json of this {config.model_type} model asks for no dropout",
            "leave it out",
        )
    return without_base_dropout(config) if wanted is False else config


def _without(layer: Layer) -> Layer:
    return tuple(
        _without_residual(step)
        if isinstance(step, Residual)
        else replace(step, branches=tuple(map(_without_residual, step.branches)), dropout=0.0)
        for step in layer
    )


def _without_residual(residual: Residual) -> Residual:
    mixer = residual.mixer
    mixer = replace(mixer, dropout=0.0) if isinstance(mixer, Attention | CrossAttention | MLP) else mixer
    return replace(residual, mixer=mixer, dropout=0.0)
