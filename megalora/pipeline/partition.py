"""Which layers stand on which pipeline stage: pure functions of counts."""

from __future__ import annotations

from collections.abc import Sequence

from megalora.errors import UserError

METHODS = ("uniform", "uniform_floor", "parameters", "cost", "custom")


def partition(
    method: str,
    layer_costs: Sequence[float],
    stages: int,
    *,
    first_cost: float = 0,
    last_cost: float = 0,
    custom: Sequence[int] | None = None,
) -> list[range]:
    """Return the layers of each stage, in order: contiguous, none empty.

    method       uniform: stage s of p has layers [n s // p, n (s + 1) // p)
                 uniform_floor: n // p each, and the remainder one each to the stages between first and last, which
                 have no embedding and no head to hold, before these two
                 parameters: the largest stage, embedding and head counted, is as small as can be
                 cost: the slowest stage is as fast as can be; costs are seconds
                 custom: as many as `custom` says
    layer_costs  parameters (or seconds) of each layer; first_cost, last_cost those of the embedding and of the head
    Raises UserError where there are fewer layers than stages, or custom does not add up.
    """
    n = len(layer_costs)
    if n < stages:
        raise UserError(
            f"pipeline_parallel_size ({stages}) is more than num_hidden_layers ({n})", f"choose at most {n}"
        )
    if method == "uniform":
        counts = [n * (s + 1) // stages - n * s // stages for s in range(stages)]
    elif method == "uniform_floor":
        counts = [n // stages] * stages
        inner_first = [*range(1, stages - 1), 0, stages - 1]
        for stage in inner_first[: n % stages]:
            counts[stage] += 1
    elif method in ("parameters", "cost"):
        counts = _balanced(layer_costs, stages, first_cost, last_cost)
    elif method == "custom":
        counts = list(custom or [])
        if len(counts) != stages or sum(counts) != n or min(counts, default=0) < 1:
            given = " ".join(map(str, counts)) or "(not given)"
            raise UserError(
                f"custom_partition {given} does not divide {n} layers over {stages} stages",
                f"give {stages} positive numbers of layers, one a stage, that add up to num_hidden_layers ({n})",
            )
    else:
        raise UserError(f"partition_method = {method!r} is unknown", f"choose among {', '.join(METHODS)}")
    bounds = [sum(counts[:s]) for s in range(stages + 1)]
    return [range(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def _balanced(costs: Sequence[float], stages: int, first_cost: float, last_cost: float) -> list[int]:
    """Return counts that minimise the dearest stage, then the sum of squares; dynamic programming over prefixes."""
    n = len(costs)
    prefix = [0.0]
    for layer_cost in costs:
        prefix.append(prefix[-1] + layer_cost)

    def cost(stage: int, a: int, b: int) -> float:
        extra = (first_cost if stage == 0 else 0) + (last_cost if stage == stages - 1 else 0)
        return prefix[b] - prefix[a] + extra

    even = [n * s // stages for s in range(stages + 1)]
    enough = max(cost(stage, a, b) for stage, (a, b) in enumerate(zip(even[:-1], even[1:], strict=True)))
    # best[b]: (dearest stage, squares, cuts) for the first `stage + 1` stages over layers [0, b); stages dearer than
    # those of an even cut are in no best one
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0, 0, ())}
    for stage in range(stages):
        longer = {}
        for b in range(stage + 1, n - (stages - 1 - stage) + 1):
            options = [
                (max(top, cost(stage, a, b)), squares + cost(stage, a, b) ** 2, (*cuts, b))
                for a, (top, squares, cuts) in best.items()
                if a < b and cost(stage, a, b) <= enough
            ]
            if options:
                longer[b] = min(options)
        best = longer
    cuts = (0, *best[n][2])
    return [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
