"""Differences of two models on the same items."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from resafe.evals.statistics.bootstrap import Bootstrap
from resafe.evals.statistics.interval import Interval, binary, column, constant, same_length
from resafe.evals.statistics.rates import wilson


def paired_difference(first: ArrayLike, second: ArrayLike, bootstrap: Bootstrap | None = None) -> Interval:
    """Difference of two models' mean scores on the same items, first − second.

    For scores of 0 and 1 the limits are Newcombe's paired score interval (1998, Statistics in Medicine 17:2635,
    method 10: Wilson limits of both rates joined by their correlation), which keeps its width where both rates are
    0 or 1 and the bootstrap's width would vanish. Other scores, and several training seeds, get the paired bootstrap;
    seeds of which all give the same, the interval of one.
    """
    bootstrap = bootstrap or Bootstrap()
    one, two = column(first), column(second)
    n = same_length(one, two)
    if n == 0:
        return Interval.undefined("no items")
    if bootstrap.blocks > 1 and constant(one) and constant(two):
        size = n // bootstrap.blocks
        found = paired_difference(one[:size], two[:size], bootstrap.one_block())
        return Interval(found.value, found.low, found.high, n)
    if not (binary(one) and binary(two)) or bootstrap.blocks > 1:
        return bootstrap.interval(
            lambda means: means["items"][:, 0] - means["items"][:, 1], {"items": np.stack([one, two])}
        )
    both = float(np.sum(one * two))
    only_one, only_two = float(one.sum()) - both, float(two.sum()) - both
    neither = n - both - only_one - only_two
    margins = (both + only_one) * (only_two + neither) * (both + only_two) * (only_one + neither)
    correlation = (both * neither - only_one * only_two) / math.sqrt(margins) if margins > 0 else 0.0
    a = wilson(int(one.sum()), n, bootstrap.confidence)
    b = wilson(int(two.sum()), n, bootstrap.confidence)
    value = a.value - b.value
    down = _joined(a.value - a.low, b.high - b.value, correlation)
    up = _joined(a.high - a.value, b.value - b.low, correlation)
    return Interval(value, max(-1.0, value - down), min(1.0, value + up), n)


def _joined(first: float, second: float, correlation: float) -> float:
    return math.sqrt(max(0.0, first * first - 2 * correlation * first * second + second * second))
