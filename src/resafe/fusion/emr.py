"""EMR merging: elect one task vector, then mask and rescale it for a task, or leave it as it is for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from resafe.errors import InputError
from resafe.fusion.base import Context, fusion_method
from resafe.tensors import elect_sign


def elected(deltas: Sequence[Tensor]) -> Tensor:
    """τ_uni: at each entry the elected sign (that of the sum) and the largest magnitude among those that have it."""
    sign = elect_sign(deltas, [1.0] * len(deltas))
    largest = torch.zeros_like(sign)
    for delta in deltas:
        largest = torch.maximum(largest, delta * sign)
    return largest * sign


@dataclass(frozen=True)
class _Rescale:
    """First pass: for each model Σ |τ_k| and Σ |m_k ⊙ τ_uni| over the whole model; their ratio is λ_k."""

    def scope(self, settings: dict[str, Any]) -> Literal["model", "tensor"]:
        """The whole model."""
        return "model"

    def rounds(self, settings: dict[str, Any]) -> int:
        """One, or none where no task's own model is asked for."""
        return 0 if settings["task"] is None else 1

    def summarise(self, deltas: Sequence[Tensor], round_: int, totals: dict[str, Any]) -> Tensor:
        """The two sums of each model, float64 (models, 2)."""
        unified = elected(deltas)
        rows = []
        for delta in deltas:
            masked = torch.where(delta * unified > 0, unified, torch.zeros_like(unified))
            rows.append(torch.stack([delta.abs().sum(dtype=torch.float64), masked.abs().sum(dtype=torch.float64)]))
        return torch.stack(rows)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Sums of two parts."""
        return a + b

    def finish(self, total: Tensor, round_: int, totals: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """λ_k, 1 where a model's mask keeps nothing."""
        return {"scales": [float(a / b) if b > 0 else 1.0 for a, b in total]}


@fusion_method("emr", title="EMR", source="Huang et al. 2024, arXiv 2405.17461", first_pass=_Rescale())
def emr(deltas: Sequence[Tensor], context: Context, *, task: int | None = None, weight: float = 1.0) -> Tensor:
    """λ · τ_uni, or for one task λ · λ_k m_k ⊙ τ_uni with m_k = [τ_k ⊙ τ_uni > 0] (§3.2).

    Args:
        deltas: Task vectors.
        context: Its statistics hold λ_k where a task is asked for.
        task: Number of the model, from 0, whose mask and rescaling are applied; None gives the unified model.
        weight: λ.

    Raises:
        InputError: There is no model of that number.
    """
    unified = elected(deltas)
    if task is None:
        return weight * unified
    if not 0 <= task < len(deltas):
        raise InputError(f"emr: there is no model {task}", f"models are numbered 0 to {len(deltas) - 1}")
    mask = deltas[task] * unified > 0
    scale = weight * float(context.statistics["scales"][task])
    return scale * torch.where(mask, unified, torch.zeros_like(unified))
