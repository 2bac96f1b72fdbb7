"""SCE: keep the entries in which the models differ most, weigh each model by its mass there, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from resafe.errors import InputError
from resafe.fusion.base import Context, at_least, fusion_method
from resafe.fusion.threshold import MagnitudeRanks
from resafe.tensors import agreeing_mean, elect_sign


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """Variance of each entry between the models (population)."""
    mean = torch.stack([delta.detach() for delta in deltas]).mean(0)
    return torch.stack([(delta.detach() - mean) ** 2 for delta in deltas]).mean(0)


def _share(settings: dict[str, Any]) -> tuple[float]:
    if not 0 <= settings["keep"] <= 1:
        raise InputError(f"sce: keep = {settings['keep']:g} is no share of entries", "give a number from 0 to 1")
    return (settings["keep"],)


@dataclass(frozen=True)
class _Pass:
    """Two rounds for the variance at which the kept share ends, one for each model's mass in what is kept."""

    ranks: MagnitudeRanks = field(default_factory=lambda: MagnitudeRanks(_share))

    def scope(self, settings: dict[str, Any]) -> Literal["model", "tensor"]:
        """Tensor by tensor."""
        return "tensor"

    def rounds(self, settings: dict[str, Any]) -> int:
        """Three."""
        return 3

    def summarise(self, deltas: Sequence[Tensor], round_: int, totals: dict[str, Any]) -> Tensor:
        """Histogram of the variance, or Σ τ_k² over the kept entries, float64 (models,)."""
        spread = variance(deltas)
        if round_ < 2:
            return self.ranks.summarise([spread], round_, totals)
        kept = spread >= totals["threshold"]
        return torch.stack([(delta.detach() ** 2 * kept).sum(dtype=torch.float64) for delta in deltas])

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum of two summaries."""
        return a + b

    def finish(self, total: Tensor, round_: int, totals: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """Under "threshold" the variance, under "shares" the models' shares of the mass."""
        if round_ == 0:
            return self.ranks.finish(total, 0, totals, settings)
        if round_ == 1:
            return {"threshold": self.ranks.finish(total, 1, totals, settings)["thresholds"][0][0]}
        mass = float(total.sum())
        shares = [float(part) / mass if mass > 0 else 1 / len(total) for part in total]
        return {**totals, "shares": shares}


@fusion_method(
    "sce", title="SCE", source="Wan et al. 2025, arXiv 2408.07990, §3.2", first_pass=_Pass(), check=at_least(2)
)
def sce(deltas: Sequence[Tensor], context: Context, *, keep: float = 0.1, weight: float = 1.0) -> Tensor:
    """λ · mean over the models with the elected sign, weighted by η_k = Σ τ_k² / Σ_j Σ τ_j², on the selected entries.

    Args:
        deltas: Task vectors.
        context: Its statistics hold the variance at which the selected share of the tensor ends, and η.
        keep: Share of entries selected, those of the largest variance between the models.
        weight: λ.
    """
    spread = variance(deltas)
    kept = spread >= context.statistics["threshold"]
    chosen = [torch.where(kept, delta, torch.zeros_like(delta)) for delta in deltas]
    return weight * agreeing_mean(chosen, context.statistics["shares"], elect_sign(chosen, [1.0] * len(chosen)))
