"""Gram matrices of one tensor's task vectors (or weights), for methods that combine by angles and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class GramPass:
    """First pass that gives ⟨τ_j, τ_k⟩ of each tensor under "gram", float64 (models, models)."""

    def scope(self, settings: dict[str, Any]) -> Literal["model", "tensor"]:
        """Tensor by tensor."""
        return "tensor"

    def rounds(self, settings: dict[str, Any]) -> int:
        """One."""
        return 1

    def summarise(self, deltas: Sequence[Tensor], round_: int, totals: dict[str, Any]) -> Tensor:
        """The Gram matrix of one part, products in float32 and their sum in float64."""
        flat = [delta.detach().flatten() for delta in deltas]
        return torch.stack([torch.stack([(a * b).sum(dtype=torch.float64) for b in flat]) for a in flat])

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum of two matrices: parts are orthogonal."""
        return a + b

    def finish(self, total: Tensor, round_: int, totals: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """The matrix."""
        return {"gram": total}
