"""DARE with TIES' election: drop at random and rescale, elect a sign, combine what agrees."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resafe.fusion.base import Context, fusion_method
from resafe.fusion.dare import dropped
from resafe.fusion.ties import Merge, consensus


@fusion_method("dare_ties", title="DARE + TIES", source="Yu et al. 2024, arXiv 2311.03099, §4.3", linear=True)
def dare_ties(
    deltas: Sequence[Tensor], context: Context, *, drop: float = 0.8, weight: float = 1.0, merge: Merge = "sum"
) -> Tensor:
    """λ · the agreeing entries of τ_k ⊙ b_k / (1 − p), summed or averaged.

    Args:
        deltas: Task vectors.
        context: Seed and names key the draws; coefficients weigh election and sum.
        drop: p, the share dropped.
        weight: λ.
        merge: "sum", since the rescaled draws already have the task vector as their expectation, or "mean".
    """
    return weight * consensus(dropped(deltas, drop, context), context.weighted(len(deltas)), merge)
