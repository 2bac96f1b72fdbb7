"""TIES: trim each task vector to its largest entries, elect a sign, average what agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from resafe.errors import InputError
from resafe.fusion.base import Context, fusion_method
from resafe.fusion.threshold import GlobalThreshold
from resafe.tensors import agreeing_mean, agreeing_sum, elect_sign, trimmed

Merge = Literal["mean", "sum"]
"""How entries that agree are combined: their mean over the models that agree (the paper's), or their sum."""


def consensus(deltas: Sequence[Tensor], weights: Sequence[float], merge: Merge) -> Tensor:
    """Elects each entry's sign by weighted mass and combines the task vectors that have it, differentiable."""
    sign = elect_sign(deltas, weights)
    return agreeing_mean(deltas, weights, sign) if merge == "mean" else agreeing_sum(deltas, weights, sign)


@fusion_method("ties", title="TIES", source="Yadav et al. 2023, arXiv 2306.01708", first_pass=GlobalThreshold())
def ties(
    deltas: Sequence[Tensor],
    context: Context,
    *,
    keep: float = 0.2,
    weight: float = 0.4,
    scope: Literal["model", "tensor"] = "model",
    merge: Merge = "mean",
) -> Tensor:
    """λ · disjoint mean of the trimmed task vectors; gradients pass through the entries that survive.

    Args:
        deltas: Task vectors.
        context: Its statistics hold the thresholds; its coefficients weigh election and mean.
        keep: Share of entries kept by magnitude; the paper keeps 20 %.
        weight: λ; SOMF uses 0.4.
        scope: Trim over the whole model, as the paper does, or over each tensor.
        merge: "mean" or "sum" of the entries that agree.

    Raises:
        InputError: `keep` is no share.
    """
    if not 0 <= keep <= 1:
        raise InputError(f"ties: keep = {keep:g} is no share of entries", "give a number from 0 to 1")
    thresholds = context.statistics["thresholds"]
    kept = [trimmed(delta, threshold) for delta, threshold in zip(deltas, thresholds, strict=True)]
    return weight * consensus(kept, context.weighted(len(kept)), merge)
