"""DARE: drop entries of each task vector at random, rescale the rest, then add."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resafe.errors import InputError
from resafe.fusion.base import Context, fusion_method
from resafe.tensors import bernoulli, weighted_sum


def drop_and_rescale(delta: Tensor, drop: float, seed: int, *names: str, start: int = 0) -> Tensor:
    """τ ⊙ b / (1 − p) with b ~ Bernoulli(1 − p) keyed by (seed, names): the expectation is τ (arXiv 2311.03099, eq. 3).

    Args:
        delta: Task vector of one tensor.
        drop: p in [0, 1).
        seed: The run's seed.
        *names: Model and tensor.
        start: Flat index of the first entry in the whole tensor.

    Raises:
        InputError: p is outside [0, 1), where the rescaling divides by zero or less.
    """
    if not 0 <= drop < 1:
        raise InputError(f"DARE cannot drop a share of {drop:g}", "give a share of at least 0 and below 1")
    keep = bernoulli(tuple(delta.shape), 1.0 - drop, seed, "dare", *names, start=start, device=delta.device)
    return (delta * keep).div_(1.0 - drop)


def dropped(deltas: Sequence[Tensor], drop: float, context: Context) -> list[Tensor]:
    """`drop_and_rescale` of every task vector, with the draws of each model and tensor apart."""
    return [
        drop_and_rescale(delta, drop, context.seed, context.model(index), context.name, start=context.start)
        for index, delta in enumerate(deltas)
    ]


@fusion_method("dare", title="DARE", source="Yu et al. 2024, arXiv 2311.03099", linear=True, additive=True)
def dare(deltas: Sequence[Tensor], context: Context, *, drop: float = 0.2, weight: float = 1.0) -> Tensor:
    """λ Σ w_k τ_k ⊙ b_k / (1 − p).

    Args:
        deltas: Task vectors.
        context: Seed and names key the draws; coefficients w_k.
        drop: p, the share dropped; SOMF uses 0.2.
        weight: λ.
    """
    return weighted_sum(dropped(deltas, drop, context), context.weighted(len(deltas), weight))
