"""Sign election between task vectors (TIES, arXiv 2306.01708, §4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
        mass.add_(tensor.detach().to(torch.float32), alpha=weight)
    return torch.copysign(torch.ones((), device=mass.device), mass)  # a sum that cancels is +0


def agreeing_mean(tensors: Sequence[Tensor], weights: Sequence[float], sign: Tensor) -> Tensor:
    """Weighted mean at each entry over the non-zero task vectors whose sign is the elected one (disjoint mean).

    Differentiable in the tensors; entries where none agrees are zero. With equal weights this is TIES' plain mean.
    """
    total, mass = torch.zeros_like(sign), torch.zeros_like(sign)
    for part, weight in zip(_agreeing(tensors, sign), weights, strict=True):
        total.add_(part, alpha=weight)
        mass.add_(part.detach().sign(), alpha=abs(weight))
    return total.mul_(sign).div_(mass.clamp_min_(torch.finfo(torch.float32).tiny))


def agreeing_sum(tensors: Sequence[Tensor], weights: Sequence[float], sign: Tensor) -> Tensor:
    """Weighted sum at each entry over the task vectors whose sign is the elected one; differentiable in the tensors."""
    total = torch.zeros_like(sign)
    for part, weight in zip(_agreeing(tensors, sign), weights, strict=True):
        total.add_(part, alpha=weight)
    return total.mul_(sign)


def _agreeing(tensors: Sequence[Tensor], sign: Tensor) -> Iterator[Tensor]:
    """|t_k| where its sign is the elected one, zero elsewhere: a product and a maximum, both of which vectorise."""
    return ((tensor.to(torch.float32) * sign).relu_() for tensor in tensors)
