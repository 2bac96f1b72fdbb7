"""Sums of tensors, accumulated in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_k w_k · t_k, accumulated in float32 and differentiable in every tensor.

    Args:
        tensors: Tensors of one shape, any floating dtype.
        weights: One weight a tensor.

    Returns:
        Float32 tensor of that shape.

    Raises:
        ValueError: The numbers of tensors and weights differ, or there is no tensor.
    """
    if not tensors or len(tensors) != len(weights):
        raise ValueError(f"{len(tensors)} tensors and {len(weights)} weights")
    total = tensors[0].to(torch.float32) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.to(torch.float32), alpha=weight)  # in place: a new buffer for each would leave the cache
    return total
