"""A base in 8 or in 4 bits: the bytes of its weights and scratch, and what its products take beside a dense one's.

It follows megalora.parallel.quantised and megalora.parallel.e4m3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from megalora.ops import nf4
from megalora.ops.fp8 import codes_bytes, terms_for
from megalora.planning.groups import Group


def linear_bytes(group: Group, base_format: str, element: int) -> int:
    """Return the bytes of the frozen weights of a group, without its branch."""
    elements = group.inputs * group.output
    if base_format == "dense":
        return elements * element
    if base_format == "fp8":
        return elements + 4 * group.output
    blocks = group.output * -(-group.inputs // nf4.BLOCK)
    scales = 4 * group.output if base_format == "nf4_fp8" else 0
    return elements // 2 + blocks + 4 * -(-blocks // nf4.NESTED_BLOCK) + scales


def multiplies_fp8(base_format: str, element: int, device_type: str) -> bool:
    """Return whether products take e4m3 codes, rather than decoded weights."""
    return base_format in ("fp8", "nf4_fp8") and element == 2 and device_type == "cuda"


def beside_bytes(group: Group, base_format: str, element: int, device_type: str) -> int:
    """Return the bytes that a matrix multiplied in e4m3 holds beside its weights: the branch's terms, scales of 1."""
    if not multiplies_fp8(base_format, element, device_type):
        return 0
    return group.output * terms_for(group.rank) + 4 * (group.inputs + group.room)


def scratch_bytes(
    counted: Sequence[tuple[int, Group]], base_format: str, element: int, device_type: str, tokens: int
) -> int:
    """Return the bytes that the quantised matrices of a stage share: one decoded; or its codes in e4m3, turned or made
    of NF4's, and those of what it is multiplied with. On a GPU a layer's experts are decoded together.

    counted  the groups with how many there are of each in a layer: more than one are experts
    tokens   of one product
    """
    if base_format == "dense":
        return 0
    together = device_type == "cuda" and element == 2
    sizes = [(times, (group.inputs + group.room) * group.output, group) for times, group in counted]
    decoded = max((times * size * element for times, size, _ in sizes if together and times > 1), default=0)
    single = [(size, group) for times, size, group in sizes if not together or times == 1]
    largest = max((size for size, _ in single), default=0)
    if not multiplies_fp8(base_format, element, device_type):
        return max(decoded, largest * element)
    if base_format == "nf4_fp8":
        made = [(group.inputs + max(group.room, terms_for(group.rank))) * group.output for _, group in single]
        largest = max(made, default=0)
    codes = max((max(group.inputs + terms_for(group.rank), group.output) for _, group in single), default=0)
    return max(decoded, largest) + codes_bytes(tokens, codes)


class _Workload(Protocol):
    @property
    def base_format(self) -> str: ...

    @property
    def element(self) -> int: ...


P = TypeVar("P", bound=Any)  # a megalora.planning.nodes.Pass


def on_base(
    one: P, group: Group, work: _Workload, device_type: str, tokens: int, product: float, *, backward: bool
) -> P:
    """Return what a pass with a group's matrix takes where the base is quantised.

    one      what it takes with a dense base, the FLOPs of `product` among it
    """
    name, e = work.base_format, work.element
    if name == "dense":
        return one
    if not multiplies_fp8(name, e, device_type):
        decoded = linear_bytes(group, name, e) + group.output * (group.inputs + 2 * group.room) * e
        return replace(one, traffic=one.traffic + decoded)
    traffic = tokens * (e + 1) * (group.output if backward else group.inputs)  # the other factor is quantised,
    if group.rank:  # the branch added by a product of its own,
        traffic += tokens * e * group.output * (1 if backward else 2)
    codes = group.inputs * group.output
    if name == "nf4_fp8":  # the codes made of NF4's, in backward turned
        traffic += linear_bytes(group, name, e) + codes
    elif backward:  # the codes turned
        traffic += 2 * codes
    calls = one.calls + (3 if backward or name == "nf4_fp8" else 2)
    return replace(one, flops=one.flops - product, flops8=product, traffic=one.traffic + traffic, calls=calls)
