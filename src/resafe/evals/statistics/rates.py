"""Intervals of one rate, and of the mean of one model's scores, in all and for each topic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from resafe.evals.statistics.bootstrap import Bootstrap
from resafe.evals.statistics.interval import Interval, binary, column, constant, normal_quantile


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a rate (Wilson 1927, JASA 22:209), without continuity correction; scipy's.

    Args:
        successes: Items that count, 0 ≤ successes ≤ n.
        n: Items in all; 0 gives an undefined interval.
        confidence: Coverage, between 0 and 1.

    Raises:
        ValueError: `successes` outside 0…n, or a confidence outside (0, 1).
    """
    normal_quantile(confidence)
    if n == 0 and successes == 0:
        return Interval.undefined("no items")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n, got {successes} of {n}")
    from scipy.stats import binomtest

    limits = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    # At the two ends the limit is exact; rounding must not put it beyond the rate.
    low = 0.0 if successes == 0 else max(0.0, float(limits.low))
    high = 1.0 if successes == n else min(1.0, float(limits.high))
    return Interval(successes / n, low, high, n)


def zero_bound(n: int) -> float:
    """Upper 95 % bound of a rate after 0 of n: 3/n, at most 1 (the rule of three, Hanley & Lippman-Hand 1983).

    It is one-sided and for 95 % only; the exact bound is 1 − 0.05^(1/n), a little lower.

    Raises:
        ValueError: There are no items.
    """
    if n < 1:
        raise ValueError(f"a bound needs at least one item, got {n}")
    return min(1.0, 3.0 / n)


def mean_interval(scores: ArrayLike, bootstrap: Bootstrap | None = None, group: str = "items") -> Interval:
    """Mean of one model's scores: Wilson interval where every score is 0 or 1, bootstrap interval otherwise.

    Over several training seeds it is the bootstrap; where all scores are equal, and it would have no width, the
    interval of one seed's items.
    """
    bootstrap = bootstrap or Bootstrap()
    found = column(scores)
    if found.size == 0:
        return Interval.undefined("no items")
    if bootstrap.blocks > 1 and constant(found):
        one = mean_interval(found[: found.size // bootstrap.blocks], bootstrap.one_block(), group)
        return Interval(one.value, one.low, one.high, found.size)
    if binary(found) and bootstrap.blocks == 1:
        return wilson(int(found.sum()), found.size, bootstrap.confidence)
    return bootstrap.interval(lambda means: means[group][:, 0], {group: found})


def by_topic(scores: ArrayLike, topics: Sequence[str], bootstrap: Bootstrap | None = None) -> dict[str, Interval]:
    """The mean of each topic's scores with its interval, topics sorted; see `mean_interval`.

    Args:
        scores: Shape (items,).
        topics: The topic of each item; items without one ("") are left out.
        bootstrap: Gives the confidence, and the draws where scores are not 0 or 1.

    Raises:
        ValueError: Not as many topics as scores.
    """
    found, names = column(scores), np.asarray(topics, dtype=object)
    if names.size != found.size:
        raise ValueError(f"{found.size} scores have {names.size} topics")
    bootstrap = bootstrap or Bootstrap()
    return {
        name: mean_interval(found[names == name], bootstrap, f"topic {name}") for name in sorted(set(topics) - {""})
    }
