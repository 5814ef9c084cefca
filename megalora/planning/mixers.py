"""Norms and mixers of one tensor-parallel rank in numbers: see megalora.planning.shapes."""

from __future__ import annotations

from dataclasses import dataclass

from megalora.planning.groups import Group


@dataclass(frozen=True)
class Norm:
    """A megalora.models.spec.Norm on one rank.

    elements    of its weights and bias
    statistics  numbers that it keeps of a row: the inverse root, and LayerNorm's mean
    """

    elements: int
    statistics: int


@dataclass(frozen=True)
class Attention:
    """A megalora.models.spec.Attention on one rank: its groups, and its heads there.

    norms          elements of the norms of q and k, and of sinks
    qk_rows        rows a token that these normalise: the heads, or 2 where each goes over all heads; 0: there are none
    qk_statistics  numbers that they keep of such a row
    qk_kernel      they are the ops of RMSNorm
    qk_across      each goes over all heads, those of other ranks too
    extra          features of q, k and v beside those of a head, which carry ALiBi's bias
    clips          q, k and v are clipped
    reads_views    attention, or what clips, keeps q k v as the linears made them
    qk_stacked     elements of their weights that are put together out of one tensor a head, and kept
    chunk          tokens of the chunks in which it goes
    causal         a token sees none behind it
    turns_first    the norms read what is rotated
    tempered       q is multiplied by a number of its position
    positions      the linears that read a table of `rows` positions, the tokens' own where these are shared; scores
                   have `terms` of them
    shares         they are the tokens' own
    biases         q and v have biases that are not the linears'
    gated          each head's result is multiplied by the sigmoid of a gate, made beside q
    v_normed       v is normed, and kept as it came too
    v_shared       k and v are one and the same part of what the linears make
    expands        its backward makes gradients of keys and values for every query head, in the compute dtype, and then
                   adds up those of heads that share them: cuDNN's and FlashAttention's do
    """

    qkv: Group
    out: Group
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    norms: int = 0
    qk_rows: int = 0
    qk_statistics: int = 0
    qk_kernel: bool = False
    qk_across: bool = False
    extra: int = 0
    clips: bool = False
    reads_views: bool = False
    qk_stacked: int = 0
    chunk: int | None = None
    causal: bool = True
    turns_first: bool = False
    tempered: bool = False
    positions: Group | None = None
    rows: int = 0
    terms: int = 0
    shares: bool = False
    biases: int = 0
    gated: bool = False
    expands: bool = False
    v_normed: bool = False
    v_shared: bool = False

    @property
    def groups(self) -> tuple[Group, ...]:
        own = () if self.positions is None or self.shares else (self.positions,)
        return (self.qkv, self.out, *own)


@dataclass(frozen=True)
class CrossAttention:
    """A megalora.models.spec.CrossAttention on one rank, and its heads there. q: of the decoder's tokens; kv: of the
    encoder's."""

    q: Group
    kv: Group
    out: Group
    heads: int
    head_dim: int
    norms: int = 0

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.q, self.kv, self.out


@dataclass(frozen=True)
class LatentAttention:
    """A megalora.models.spec.LatentAttention on one rank, and its heads there.

    down    from the input to the latents: of queries (not where `direct`: q_up reads the input), of keys and values
    norms   elements of the norms of the latents
    tempered  q is multiplied by a number of its position
    """

    down: Group
    q_up: Group
    kv_up: Group
    out: Group
    direct: bool
    heads: int
    head_dim: int
    turned: int
    value: int
    norms: int
    tempered: bool = False

    @property
    def groups(self) -> tuple[Group, ...]:
        """The first reads the input with room behind it."""
        return (self.q_up, self.down, self.kv_up, self.out) if self.direct else (
            self.down, self.q_up, self.kv_up, self.out
        )  # fmt: skip


@dataclass(frozen=True)
class DeltaAttention:
    """A megalora.models.spec.DeltaAttention on one rank, and its key heads there, each of which `repeats` value heads
    read.

    norms  elements of its norm, convolution, decay and bias
    """

    inputs: Group
    out: Group
    key_heads: int
    repeats: int
    key: int
    value: int
    norms: int

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.inputs, self.out


@dataclass(frozen=True)
class GatedConvolution:
    """A megalora.models.spec.GatedConvolution on one rank.

    norms  elements of its convolution
    """

    inputs: Group
    out: Group
    width: int
    norms: int

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.inputs, self.out


@dataclass(frozen=True)
class StateSpace:
    """A megalora.models.spec.StateSpace on one rank, its heads there and the groups that they read.

    normed  there is a norm; norms: elements of it, convolution, decay, bias and skip
    """

    inputs: Group
    out: Group
    heads: int
    groups_read: int
    features: int
    state: int
    normed: bool
    norms: int

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.inputs, self.out


@dataclass(frozen=True)
class MLP:
    """A megalora.models.spec.MLP on one rank.

    gates  down reads act(gate) * up, else act(up)
    fused  which megalora.ops.swiglu makes, inside the group of down
    norms  numbers that the activation has of its own
    """

    up: Group
    down: Group
    gates: bool
    act: str
    fused: bool
    norms: int = 0

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.up, self.down


@dataclass(frozen=True)
class Experts:
    """A megalora.models.spec.Experts on one rank.

    router       whole on every rank; wide: in float32
    up, down     of one expert, of which the rank holds `held`
    count, top   experts in all, and how many a token chooses
    shared, gate the MLP of all tokens and the linear that gates it
    spared       elements of factors that its experts share, which it does not hold for each
    norms        elements of what corrects the choice
    drops        adapters of the experts have dropout
    grouped      experts are chosen from the best groups of them
    """

    router: Group
    up: Group
    down: Group
    held: int
    count: int
    top: int
    wide: bool
    shared: MLP | None
    gate: Group | None
    spared: int = 0
    norms: int = 0
    drops: bool = False
    grouped: bool = False

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(group for _, group in self.counted)

    @property
    def counted(self) -> tuple[tuple[int, Group], ...]:
        """Every group, and how many of it the rank holds."""
        shared = () if self.shared is None else self.shared.groups
        gate = () if self.gate is None else (self.gate,)
        alone = tuple((1, group) for group in (self.router, *shared, *gate))
        return ((self.held, self.up), (self.held, self.down), *alone)

    @property
    def trains(self) -> bool:
        return any(group.trains for group in self.groups)

    def rows(self, tokens: int) -> int:
        """Return how many pairs of `tokens` tokens fall to the rank: its even share."""
        return min(tokens * min(self.top, self.held), round(tokens * self.top * self.held / self.count))


Recurrent = DeltaAttention | GatedConvolution | StateSpace
Mixer = Attention | CrossAttention | LatentAttention | MLP | Experts | Recurrent


def counted(mixer: Mixer) -> tuple[tuple[int, Group], ...]:
    """Return the groups of a mixer, and how many of each the rank holds."""
    return mixer.counted if isinstance(mixer, Experts) else tuple((1, group) for group in mixer.groups)
