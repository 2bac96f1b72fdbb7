"""Task singular vectors: keep each task's leading directions and make those of different tasks orthogonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resafe.errors import InputError
from resafe.fusion.base import Context, fusion_method
from resafe.tensors import weighted_sum


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with orthonormal columns (or rows) that is nearest to the given one: its polar factor."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    factor: Tensor = left @ right
    return factor


@fusion_method("tsv", title="Task singular vectors", source="Gargiulo et al. 2025, arXiv 2412.00081", part="tensor")
def tsv(deltas: Sequence[Tensor], context: Context, *, share: float | None = None, weight: float = 1.0) -> Tensor:
    """λ · U_⊥ Σ V_⊥ᵀ: the leading singular vectors of all tasks side by side, decorrelated by whitening (alg. 1).

    Tensors that are no matrices are averaged, as in the paper.

    Args:
        deltas: Task vectors of one whole tensor.
        context: Coefficients multiply a task's singular values.
        share: Share of each task's singular vectors that is kept; None is 1 / number of tasks.
        weight: λ.

    Raises:
        InputError: `share` is no share.
    """
    count = len(deltas)
    portion = 1 / count if share is None else share
    if not 0 < portion <= 1:
        raise InputError(f"tsv: share {portion:g} is no share", "give a number above 0, up to 1")
    weights = context.weighted(count)
    if deltas[0].ndim != 2 or min(deltas[0].shape) < 2:
        return weighted_sum(deltas, [weight * w / count for w in weights])
    rank = max(1, int(min(deltas[0].shape) * portion))
    parts = [torch.linalg.svd(delta.float(), full_matrices=False) for delta in deltas]
    left = torch.cat([u[:, :rank] for u, _, _ in parts], dim=1)
    values = torch.cat([w * s[:rank] for (_, s, _), w in zip(parts, weights, strict=True)])
    right = torch.cat([v[:rank] for _, _, v in parts], dim=0)
    return weight * (nearest_orthogonal(left) * values) @ nearest_orthogonal(right)
