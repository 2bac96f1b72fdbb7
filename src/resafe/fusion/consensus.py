"""Consensus merging with TALL masks: keep entries that at least so many tasks need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resafe.fusion.base import Context, fusion_method
from resafe.tensors import weighted_sum


@fusion_method("consensus", title="Consensus (TALL masks)", source="Wang et al. 2024, arXiv 2405.07813", linear=True)
def consensus_ta(
    deltas: Sequence[Tensor], context: Context, *, strength: float = 0.4, needed: int = 2, weight: float = 0.3
) -> Tensor:
    """λ · τ_all ⊙ [Σ_k m_k ≥ c], m_k = |τ_k| > λ_t |τ_all − τ_k| (eq. 4 and 6), τ_all = Σ w_k τ_k.

    Args:
        deltas: Task vectors.
        context: Coefficients w_k.
        strength: λ_t; higher keeps fewer entries for a task.
        needed: c: by how many tasks an entry must be needed; 1 drops only what none needs.
        weight: λ.
    """
    total = weighted_sum(deltas, context.weighted(len(deltas)))
    votes = torch.zeros_like(total)
    for delta in deltas:
        votes += delta.detach().abs() > strength * (total.detach() - delta.detach()).abs()
    return weight * torch.where(votes >= needed, total, torch.zeros_like(total))
