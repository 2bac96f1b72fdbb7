"""An estimate with its limits, and the checks that all figures share. Knows nothing of models, files or judges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence limits.

    Attributes:
        value: The point estimate; NaN where it is undefined.
        low: Lower limit, in the same unit.
        high: Upper limit.
        n: Number of items it was measured on.
        reason: Why the value is undefined; empty where it is defined.
    """

    value: float
    low: float
    high: float
    n: int
    reason: str = ""

    @classmethod
    def undefined(cls, reason: str, n: int = 0) -> Interval:
        """The interval of a quantity that cannot be given, with the reason."""
        return cls(math.nan, math.nan, math.nan, n, reason)

    @property
    def defined(self) -> bool:
        """Whether there is a value."""
        return not math.isnan(self.value)

    def to_json(self) -> dict[str, Any]:
        """`{"value", "low", "high", "n"}`; a number that is not finite is null, and `reason` says why."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        shown = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        return {**shown, "n": self.n} | ({"reason": self.reason} if self.reason else {})


def normal_quantile(confidence: float) -> float:
    """The two-sided quantile of the normal distribution: 1.96 for 95 %.

    Raises:
        ValueError: The confidence is not between 0 and 1.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)


def column(values: ArrayLike) -> Array:
    """Scores as float64.

    Raises:
        ValueError: They are not one-dimensional.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1:
        raise ValueError(f"scores must be one-dimensional, got the shape {found.shape}")
    return found


def same_length(*columns: Array) -> int:
    """The length that all columns have.

    Raises:
        ValueError: They have different lengths.
    """
    lengths = {one.size for one in columns}
    if len(lengths) != 1:
        raise ValueError(f"paired scores must be of the same items, got the lengths {sorted(lengths)}")
    return lengths.pop()


def same_items(*columns: ArrayLike) -> list[Array]:
    """Columns as float64, checked to be one-dimensional and of one length."""
    arrays = [column(one) for one in columns]
    same_length(*arrays)
    return arrays


def binary(scores: Array) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.all((scores == 0.0) | (scores == 1.0)))


def constant(scores: Array) -> bool:
    """Whether all scores are equal."""
    return bool(np.all(scores == scores[0]))
