"""Blocks of features that are plain numbers, standardised by the rows they were fitted on: signs, hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Standard:
    """Mean and spread of a block's columns.

    Attributes:
        centre: Means, shape (columns,).
        spread: Standard deviations; 1 for a column that never varies. Shape (columns,).
        size: What a standard deviation becomes: small beside a TF-IDF row of length 1, so that a block of many columns
            is held back as much as the words are.
    """

    centre: NDArray[np.float64]
    spread: NDArray[np.float64]
    size: float

    def __call__(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Standardised values, shape (items, columns)."""
        return np.asarray(self.size * (values - self.centre) / self.spread, dtype=np.float64)

    @classmethod
    def fit(cls, values: NDArray[np.float64], size: float) -> Standard:
        """Learns mean and spread, as scikit-learn's StandardScaler does."""
        spread = values.std(axis=0)
        return cls(values.mean(axis=0), np.where(spread > 1e-12, spread, 1.0), size)


__all__ = ["Standard"]
