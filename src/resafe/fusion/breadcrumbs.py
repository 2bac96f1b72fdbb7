"""Model Breadcrumbs: leave out each tensor's largest entries and its smallest, then add what lies between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resafe.errors import InputError
from resafe.fusion.base import Context, fusion_method
from resafe.fusion.threshold import MagnitudeRanks
from resafe.fusion.ties import consensus
from resafe.tensors import weighted_sum

_SOURCE = "Davari, Belilovsky 2023, arXiv 2312.06795"


def _shares(settings: dict[str, float]) -> tuple[float, float]:
    """Shares of entries that are larger than what is kept, and that are as large or larger than its smallest."""
    keep, top = settings["keep"], settings["top"]
    if not (0 <= keep <= 1 and 0 <= top <= 1):
        raise InputError(f"breadcrumbs: keep {keep:g} and top {top:g} are no shares", "give numbers from 0 to 1")
    return top, min(1.0, top + keep)


def _between(deltas: Sequence[Tensor], context: Context) -> list[Tensor]:
    kept = []
    for delta, (upper, lower) in zip(deltas, context.statistics["thresholds"], strict=True):
        size = delta.detach().abs()
        kept.append(torch.where((size < upper) & (size >= lower), delta, torch.zeros_like(delta)))
    return kept


@fusion_method("breadcrumbs", title="Breadcrumbs", source=_SOURCE, first_pass=MagnitudeRanks(_shares))
def breadcrumbs(
    deltas: Sequence[Tensor], context: Context, *, keep: float = 0.85, top: float = 0.01, weight: float = 1.0
) -> Tensor:
    """λ Σ w_k m_k ⊙ τ_k, m_k leaving out the largest share `top` of each tensor and the smallest 1 − top − keep.

    Args:
        deltas: Task vectors.
        context: Its statistics hold each tensor's two thresholds; coefficients w_k.
        keep: Share of entries that is kept.
        top: Share of the largest entries, left out.
        weight: λ.
    """
    return weighted_sum(_between(deltas, context), context.weighted(len(deltas), weight))


@fusion_method("breadcrumbs_ties", title="Breadcrumbs + TIES", source=_SOURCE, first_pass=MagnitudeRanks(_shares))
def breadcrumbs_ties(
    deltas: Sequence[Tensor], context: Context, *, keep: float = 0.85, top: float = 0.01, weight: float = 1.0
) -> Tensor:
    """As `breadcrumbs`, summing only what has the sign that TIES elects.

    Args:
        deltas: Task vectors.
        context: Its statistics hold each tensor's two thresholds; coefficients weigh election and sum.
        keep: Share of entries that is kept.
        top: Share of the largest entries, left out.
        weight: λ.
    """
    return weight * consensus(_between(deltas, context), context.weighted(len(deltas)), "sum")
