"""Tests between models on the same items, and their correction where several are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from resafe.evals.statistics.bootstrap import Bootstrap
from resafe.evals.statistics.differences import paired_difference
from resafe.evals.statistics.interval import Interval, binary, same_items


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test: items on which exactly one of two models scored, and the two-sided p-value."""

    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """Two models on one set of questions.

    Attributes:
        first: Name of a model.
        second: Name of the model it is compared with.
        set: Name of the set of questions.
        difference: Mean score of the first minus that of the second, paired.
        only_first: Items on which only the first scored.
        only_second: Items on which only the second scored.
        p_value: Exact McNemar.
        p_holm: The same, corrected by Holm's method for the number of sets that these two models were compared on.
    """

    first: str
    second: str
    set: str
    difference: Interval
    only_first: int
    only_second: int
    p_value: float
    p_holm: float


def mcnemar_exact(first: ArrayLike, second: ArrayLike) -> McNemar:
    """Exact two-sided McNemar test on 0/1 scores of the same items (scipy's binomial test on the discordant ones).

    Raises:
        ValueError: The lengths differ, or a score is neither 0 nor 1.
    """
    one, two = same_items(first, second)
    if not (binary(one) and binary(two)):
        raise ValueError("McNemar's test needs scores of 0 and 1")
    from scipy.stats import binomtest

    only_first = int(np.sum((one == 1) & (two == 0)))
    only_second = int(np.sum((one == 0) & (two == 1)))
    trials = only_first + only_second
    p_value = float(binomtest(only_first, trials, 0.5).pvalue) if trials else 1.0
    return McNemar(only_first, only_second, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down method (1979), in the same order; statsmodels'."""
    if not len(p_values):
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(list(p_values), method="holm")[1]]


def compare(
    first: str,
    second: str,
    sets: Mapping[str, tuple[ArrayLike, ArrayLike]],
    bootstrap: Bootstrap | None = None,
) -> list[Comparison]:
    """Compares two models on every set: paired difference, exact McNemar, Holm across the sets.

    Args:
        first: Name of a model.
        second: Name of the other.
        sets: Set → scores of 0 and 1 of both models on the same items; sets without items are left out.
        bootstrap: Gives the confidence of the differences.

    Raises:
        ValueError: Scores are not paired, or are neither 0 nor 1.
    """
    used = {name: pair for name, pair in sets.items() if np.size(pair[0])}
    found = {name: mcnemar_exact(*pair) for name, pair in used.items()}
    corrected = holm([test.p_value for test in found.values()])
    return [
        Comparison(
            first,
            second,
            name,
            paired_difference(*used[name], bootstrap),
            test.only_first,
            test.only_second,
            test.p_value,
            p_holm,
        )
        for (name, test), p_holm in zip(found.items(), corrected, strict=True)
    ]
