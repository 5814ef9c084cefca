"""Mixers that keep a state instead of keys and values, as data. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megalora.models.linears import Blocked, Fused, Linear, Projection, linears_of
from megalora.models.mixers import Norm


@dataclass(frozen=True)
class DeltaAttention:
    """Linear attention by the gated delta rule (see megalora.ops.delta_mixer, which has the formulas).

    q, k, v, z, b, a  a linear each, or Fused with parts of these names, whose units are the rows of one key head
    groups, repeats   key heads, and value heads that read each
    key, value        features of a head
    width             tokens that the convolution of q, k and v reads
    convolution, decay, bias  names of a module with `weight` [channels, 1, width] and of tensors [groups repeats]
    norm              of each value head's result, before the gate
    """

    q: Projection
    k: Projection
    v: Projection
    z: Projection
    b: Projection
    a: Projection
    out: Linear
    groups: int
    repeats: int
    key: int
    value: int
    width: int
    convolution: str
    decay: str
    bias: str
    norm: Norm

    told = "layers of linear attention by the gated delta rule"
    biased = True

    @property
    def rows(self) -> Mapping[str, int]:
        """Rows of each output that are of one key head, in order."""
        values = self.repeats * self.value
        return {"q": self.key, "k": self.key, "v": values, "z": values, "b": self.repeats, "a": self.repeats}

    @property
    def projections(self) -> Mapping[str, Projection]:
        """What makes each output, in order."""
        return {"q": self.q, "k": self.k, "v": self.v, "z": self.z, "b": self.b, "a": self.a}

    @property
    def channels(self) -> Blocked:
        """Where q, k and v lie among the channels of the convolution."""
        return Blocked(tuple((name, self.groups) for name in "qkv"), tuple(self.rows[name] for name in "qkv"))

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*linears_of(tuple(self.projections.values())), self.out)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.norm,)

    @property
    def step_flops(self) -> int:
        """FLOPs of one token's step: what the state says of k, its change, and what it says of q."""
        return 6 * self.groups * self.repeats * self.key * self.value

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of what is neither linear nor norm."""
        channels = self.groups * sum(self.rows[name] for name in "qkv")
        yield f"{self.convolution}.weight", (channels, 1, self.width)
        yield self.decay, (self.groups * self.repeats,)
        yield self.bias, (self.groups * self.repeats,)


@dataclass(frozen=True)
class GatedConvolution:
    """c * (the convolution of b * x over the last `width` tokens), of each channel (LFM2).

    made         b, c and x, Fused with parts of these names, of `channels` rows each
    convolution  name of a module with `weight` [channels, 1, width]; biased: and `bias` [channels]
    """

    made: Fused
    out: Linear
    channels: int
    width: int
    convolution: str
    biased: bool = False

    told = "layers of gated short convolutions"

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.made.linear, self.out)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return ()

    @property
    def step_flops(self) -> int:
        """FLOPs of one token's step: the convolution and both gates."""
        return 2 * self.channels * (self.width + 1)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of what is neither linear nor norm."""
        yield f"{self.convolution}.weight", (self.channels, 1, self.width)
        if self.biased:
            yield f"{self.convolution}.bias", (self.channels,)


@dataclass(frozen=True)
class StateSpace:
    """Mamba-2 (see megalora.ops.mamba_mixer, which has the formulas).

    made             z, x, b, c and dt, Fused with parts of these names: z, x and dt by head, b and c by group
    heads, features  heads, and features of each
    groups, state    groups of heads that read one b and c, and their features
    width            tokens that the convolution of x, b and c reads
    convolution      name of a module with `weight` [channels, 1, width] and, where it is `convolution_biased`, `bias`
    decay, bias, skip  names of tensors [heads]
    norm             of the heads of each group together, behind the gate; its weight is [heads features]
    scales           what z, x, b, c and dt are multiplied by
    out_by_name      all-linear leaves `out` out: peft refuses an adapter of it
    """

    made: Fused
    out: Linear
    heads: int
    features: int
    groups: int
    state: int
    width: int
    convolution: str
    decay: str
    bias: str
    skip: str
    norm: Norm | None
    convolution_biased: bool = True
    scales: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)
    out_by_name: bool = False

    told = "layers of Mamba-2"
    biased = True

    @property
    def rows(self) -> Mapping[str, int]:
        """Rows of each output that are of one head, or of one group, in order."""
        return {"z": self.features, "x": self.features, "b": self.state, "c": self.state, "dt": 1}

    @property
    def channels(self) -> Blocked:
        """Where x, b and c lie among the channels of the convolution."""
        units = (("x", self.heads), ("b", self.groups), ("c", self.groups))
        return Blocked(units, (self.features, self.state, self.state))

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.made.linear, self.out)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return () if self.norm is None else (self.norm,)

    @property
    def step_flops(self) -> int:
        """FLOPs of one token's step: the change of the state, and what it says of c."""
        return 4 * self.heads * self.features * self.state

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of what is neither linear nor norm."""
        channels = self.heads * self.features + 2 * self.groups * self.state
        yield f"{self.convolution}.weight", (channels, 1, self.width)
        if self.convolution_biased:
            yield f"{self.convolution}.bias", (channels,)
        yield from ((name, (self.heads,)) for name in (self.decay, self.bias, self.skip))


RecurrentMixer = DeltaAttention | GatedConvolution | StateSpace
"""Each has `told`, what messages call it, and `biased`: whether it has biases that are no linear's."""
