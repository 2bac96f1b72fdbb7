"""Sign election between task vectors (TIES, arXiv 2306.01708, §4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def elect_sign(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sign of the larger total mass at each entry: sign(Σ_k w_k t_k), with zero counted as positive.

    Args:
        tensors: Trimmed task vectors of one shape.
        weights: One weight a task vector.

    Returns:
        Float32 tensor of ±1.
    """
    mass = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        mass = mass + weight * tensor.detach().to(torch.float32)
    return torch.where(mass >= 0, 1.0, -1.0)


def agreeing_mean(tensors: Sequence[Tensor], weights: Sequence[float], sign: Tensor) -> Tensor:
    """Weighted mean at each entry over the non-zero task vectors whose sign is the elected one (disjoint mean).

    Differentiable in the tensors; entries where none agrees are zero. With equal weights this is TIES' plain mean.
    """
    total = torch.zeros_like(sign)
    mass = torch.zeros_like(sign)
    for tensor, weight in zip(tensors, weights, strict=True):
        value = tensor.to(torch.float32)
        agrees = ((value.detach() * sign) > 0).to(torch.float32)
        total = total + weight * value * agrees
        mass = mass + abs(weight) * agrees
    return total / mass.clamp_min(torch.finfo(torch.float32).tiny)


def agreeing_sum(tensors: Sequence[Tensor], weights: Sequence[float], sign: Tensor) -> Tensor:
    """Weighted sum at each entry over the task vectors whose sign is the elected one; differentiable in the tensors."""
    total = torch.zeros_like(sign)
    for tensor, weight in zip(tensors, weights, strict=True):
        value = tensor.to(torch.float32)
        total = total + weight * value * ((value.detach() * sign) > 0)
    return total
