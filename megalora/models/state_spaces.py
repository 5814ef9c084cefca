"""Parts of specs with Mamba-2: each takes the fields of a config and names as the file has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megalora.models.family import Fields
from megalora.models.parts import rms
from megalora.models.spec import Blocked, Fused, Linear, ModelSpec, Norm, StateSpace, mixers_of

MAMBA_FIELDS = frozenset(
    """mamba_n_heads mamba_d_head mamba_n_groups mamba_d_state mamba_d_conv mamba_expand mamba_conv_bias mamba_proj_bias
    time_step_limit""".split()
)
MAMBA_HARMLESS = frozenset({"mamba_chunk_size"})  # in which it is computed, whatever the numbers


def mamba(hf: Fields) -> StateSpace:
    """Return the Mamba-2 of Bamba, whose inner features are mamba_expand hidden_size."""
    heads, features, bias = hf.mamba_n_heads, hf.mamba_d_head, bool(hf.mamba_proj_bias)
    inner = int(hf.mamba_expand * hf.hidden_size)
    if heads * features != inner:
        product = f"mamba_n_heads ({heads}) x mamba_d_head ({features})"
        hf.fail(f"{product} is not mamba_expand ({hf.mamba_expand}) x hidden_size ({hf.hidden_size})", "correct them")
    return state_space(
        hf, "mamba", heads, features, hf.mamba_n_groups, hf.mamba_d_state, hf.mamba_d_conv, (bias, bias),
        bool(hf.mamba_conv_bias), rms(hf, "mamba.norm", inner, precise=True),
    )  # fmt: skip


def state_space(
    hf: Fields,
    at: str,
    heads: int,
    features: int,
    groups: int,
    state: int,
    width: int,
    biases: tuple[bool, bool],
    convolution_biased: bool,
    norm: Norm | None,
    scales: Sequence[float] = (1.0,) * 5,
    out_by_name: bool = False,
) -> StateSpace:
    """Return Mamba-2 below `at`. biases: of its linears in_proj and out_proj; the others: see StateSpace.

    Raises UserError for groups that do not divide the heads, and for limits of the time steps.
    """
    if heads % groups:
        hf.fail(f"{heads} heads of Mamba-2 are not a multiple of its {groups} groups", "correct them")
    if hf.reads("time_step_limit"):
        limit = hf.time_step_limit
        if limit is not None and tuple(limit) != (0.0, math.inf):
            hf.fail(f"time_step_limit = {limit!r} is not implemented", "take a model whose time steps have no limits")
    units, rows = (heads, heads, groups, groups, heads), (features, features, state, state, 1)
    parts = tuple(zip(("z", "x", "b", "c", "dt"), units, strict=True))
    outputs = sum(count * size for count, size in zip(units, rows, strict=True))
    z, x, b, c, dt = map(float, scales)
    return StateSpace(
        Fused(Linear(f"{at}.in_proj", hf.hidden_size, outputs, biases[0]), Blocked(parts, rows)),
        Linear(f"{at}.out_proj", heads * features, hf.hidden_size, biases[1]),
        heads,
        features,
        groups,
        state,
        width,
        f"{at}.conv1d",
        f"{at}.A_log",
        f"{at}.dt_bias",
        f"{at}.D",
        norm,
        convolution_biased,
        (z, x, b, c, dt),
        out_by_name,
    )


def layer_kinds(hf: Fields, kinds: Sequence[str] | None, also: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the kind of each layer: "linear_attention" (Mamba-2), "full_attention", or one of `also`.

    Old configs say mamba and attention. Raises UserError for another kind, and where no layer has attention.
    """
    known = ("linear_attention", "full_attention", *also)
    found = tuple({"mamba": known[0], "attention": known[1]}.get(kind, kind) for kind in kinds or ())
    if len(found) != hf.num_hidden_layers:
        hf.fail(f"layer_types has {len(found)} entries for {hf.num_hidden_layers} layers", "correct it")
    for kind in found:
        if kind not in known:
            hf.fail(f"a layer is of kind {kind!r}, which is not implemented", f"take a model with {', '.join(known)}")
    if "full_attention" not in found:
        hf.fail("no layer has attention, which is not implemented", "take a model with both kinds of layers")
    return found


def by_name(config: ModelSpec) -> frozenset[str]:
    """Return the full names of linears of Mamba-2 that are adapted only where they are named."""
    return frozenset(
        config.stack.of_layer(index, mixer.out.name)
        for index, layer in enumerate(config.stack.layers)
        for mixer in mixers_of(layer)
        if isinstance(mixer, StateSpace) and mixer.out_by_name
    )
