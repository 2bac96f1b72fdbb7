"""Weight averaging: the mean of the tuned models, i.e. θ_a + mean of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resafe.errors import InputError
from resafe.fusion.base import Context, fusion_method
from resafe.tensors import weighted_sum


@fusion_method(
    "average", title="Weight averaging", source="Wortsman et al. 2022, arXiv 2203.05482", linear=True, affine=True,
    weighted_sum=True,
)  # fmt: skip
def average(deltas: Sequence[Tensor], context: Context, *, weights: list[float] | None = None) -> Tensor:
    """Σ w_k τ_k / Σ w_k; equal weights by default.

    Args:
        deltas: Task vectors, or whole weights: a mean of shifted values is the shifted mean.
        context: Coefficients, which multiply the weights.
        weights: One weight a model.

    Raises:
        InputError: The number of weights is not that of the models, or they add up to zero.
    """
    given = weights or [1.0] * len(deltas)
    chosen = [a * b for a, b in zip(given, context.weighted(len(given)), strict=False)]
    if len(given) != len(deltas) or sum(chosen) == 0:
        raise InputError(
            f"average: {len(given)} weights for {len(deltas)} models",
            "give one weight a model, with a sum that is not 0",
        )
    return weighted_sum(deltas, [weight / sum(chosen) for weight in chosen])
