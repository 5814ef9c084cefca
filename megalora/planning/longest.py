"""The longest row that each layout can train on given GPUs."""

from __future__ import annotations

from dataclasses import replace
from math import lcm

from megalora.errors import UserError
from megalora.planning.layouts import Planner
from megalora.planning.plans import Plan, Sizes, TooLarge, Wanted

_UNIT = 1024  # tokens that lengths are multiples of, at least
_CLOSE = 1.01  # a length is found to this factor
_MOST = 2**28  # tokens: no longer row is looked for


def longest_rows(planner: Planner, wanted: Wanted, gpus: int) -> tuple[list[Plan], list[TooLarge]]:
    """Return the plan of the longest row of each tensor x pipeline x context size, the longest first, and the rest.

    wanted  work's seq_length, step_rows and rows are not read: a microbatch is one row, and a step has
            wanted.microbatches of them on each data-parallel rank (None: one for each pipeline stage)
    rest    the sizes that cannot train the shortest row that is tried, least memory first
    Raises UserError where there is no layout at all.
    """
    unit, reasons = lcm(_UNIT, gpus), list[str]()
    wanted = replace(wanted, step_rows=None, rows=1)
    shortest = _asked(replace(wanted, microbatches=wanted.microbatches or 1), unit)
    found, rest = list[Plan](), list[TooLarge]()
    for sizes in planner.sizes(shortest, reasons):
        plan = _longest(planner, sizes, replace(wanted, microbatches=wanted.microbatches or sizes[1]), unit)
        found += [plan] if isinstance(plan, Plan) else []
        rest += [plan] if isinstance(plan, TooLarge) else []
    if not found and not rest:
        said = "; ".join(dict.fromkeys(reasons))
        raise UserError(f"no layout of {gpus} GPUs: {said}", "leave sizes of the layout free")
    return (
        sorted(found, key=lambda plan: (-plan.layout.work.seq_length, plan.seconds)),
        sorted(rest, key=lambda one: one.memory.total),
    )


def _longest(planner: Planner, sizes: Sizes, wanted: Wanted, unit: int) -> Plan | TooLarge:
    """Search the longest row: what n tokens need grows with n, which is doubled until it does not fit, then halved in
    between.
    """
    best = planner.fastest(sizes, _asked(wanted, unit))
    if isinstance(best, TooLarge):
        return best
    low, high = 1, 2
    while high * unit <= _MOST and isinstance(plan := planner.fastest(sizes, _asked(wanted, high * unit)), Plan):
        best, low, high = plan, high, 2 * high
    while high - low > max(1, int(low * (_CLOSE - 1))):
        middle = (low + high) // 2
        plan = planner.fastest(sizes, _asked(wanted, middle * unit))
        if isinstance(plan, Plan):
            best, low = plan, middle
        else:
            high = middle
    return best


def _asked(wanted: Wanted, tokens: int) -> Wanted:
    return replace(wanted, work=replace(wanted.work, seq_length=tokens))
