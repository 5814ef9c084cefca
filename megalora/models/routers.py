"""How the experts of a token are chosen, as data."""

from __future__ import annotations

from dataclasses import dataclass

from megalora.models.linears import Linear


@dataclass(frozen=True)
class Router:
    """Chooses `top` experts for each token, and the weights of their results. Ties go to the lower index.

    linear       logits, one an expert
    score        "softmax" over all experts, or "sigmoid"
    by_logits    the choice is by the logits, in the dtype that they have, not by the scores
    renormalise  the chosen scores are divided by their sum and `epsilon`
    scale        what the weights are multiplied by
    wide         logits are computed in float32, else in the compute dtype (scores always in float32)
    correction   name of a bias that is added to the scores for the choice alone; correction_row: it is [1, experts] in
                 the file, else [experts]
    reads_scaled name of a tensor [in_features] that its input is multiplied by, and by `input_factor`; None: 1
    jitter       the weight of each choice is its share, by softmax, of logits nearly as great as it that are not chosen
                 before: within 2 jitter of it, as a share of the greater (phimoe); None: by `score`
    of_expert    name of a tensor [experts] that the weights are multiplied by, behind all else; None: 1
    groups       experts are chosen from the best `kept_groups` of so many groups; a group is as good as the sum of its
                 best `group_top` scores
    """

    linear: Linear
    top: int
    score: str = "softmax"
    by_logits: bool = False
    renormalise: bool = False
    scale: float = 1.0
    wide: bool = False
    correction: str | None = None
    correction_row: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_top: int = 1
    reads_scaled: str | None = None
    input_factor: float = 1.0
    of_expert: str | None = None
    epsilon: float = 1e-20
    jitter: float | None = None
