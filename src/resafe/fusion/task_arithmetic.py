"""Task arithmetic: a scaled sum of task vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resafe.fusion.base import Context, fusion_method
from resafe.tensors import weighted_sum


@fusion_method(
    "task_arithmetic", title="Task arithmetic", source="Ilharco et al. 2023, arXiv 2212.04089", linear=True,
    weighted_sum=True,
)  # fmt: skip
def task_arithmetic(deltas: Sequence[Tensor], context: Context, *, weight: float = 1.0) -> Tensor:
    """λ Σ w_k τ_k.

    Args:
        deltas: Task vectors of one tensor.
        context: Coefficients w_k.
        weight: λ; SOMF uses 0.3 for adapters and 0.04 for full weights. One model with λ = 1 is that model.
    """
    return weighted_sum(deltas, context.weighted(len(deltas), weight))
