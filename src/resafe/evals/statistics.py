"""Intervals and paired tests for rates measured on the same items; frontiers are taken from `frontier.py`.

Knows arrays of per-item scores and nothing of models, files or judges. A rate of one model gets a Wilson score
interval, a difference of two models on the same items a paired score interval, and a ratio of differences (the two
measures of success) a paired bootstrap: one replicate draws the items once and uses them for every model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from resafe.evals.frontier import frontier as frontier
from resafe.evals.frontier import hypervolume as hypervolume

Array = NDArray[np.float64]
Statistic = Callable[[Mapping[str, Array]], Array]

_CELLS = 4_000_000
"""Cells of the resampling matrix converted to float64 at once: 32 MB."""
_ZERO = 1e-12


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


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test: items on which exactly one of two models scored, and the two-sided p-value."""

    only_first: int
    only_second: int
    p_value: float


def _z(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)


def _column(values: ArrayLike) -> Array:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError(f"scores must be one-dimensional, got the shape {column.shape}")
    return column


def _same_length(*columns: Array) -> int:
    lengths = {column.size for column in columns}
    if len(lengths) != 1:
        raise ValueError(f"paired scores must be of the same items, got the lengths {sorted(lengths)}")
    return lengths.pop()


def _binary(column: Array) -> bool:
    return bool(np.all((column == 0.0) | (column == 1.0)))


def _constant(column: Array) -> bool:
    return bool(np.all(column == column[0]))


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a rate (Wilson 1927, JASA 22:209), without continuity correction.

    Args:
        successes: Items that count, 0 ≤ successes ≤ n.
        n: Items in all; 0 gives an undefined interval.
        confidence: Coverage, between 0 and 1.

    Raises:
        ValueError: `successes` outside 0…n, or a confidence outside (0, 1).
    """
    z = _z(confidence)
    if n == 0 and successes == 0:
        return Interval.undefined("no items")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n, got {successes} of {n}")
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the two ends the limit is exact; rounding must not put it beyond the rate.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(rate, low, high, n)


class Bootstrap:
    """A plan of paired resampling: which items each replicate holds, fixed by the seed and the group's name.

    A group is a set of items that are drawn together (the harmful questions, the harmless ones, one task's items).
    Groups are drawn independently of each other; within a group every model sees the same draw. The draw of a group
    depends on (seed, group, number of items) only, so that every figure of a table rests on the same replicates.

    Models trained with several seeds answer the same items: a column is then the answers of the first seed, those of
    the second, and so on. Seeds and items are crossed, and each replicate draws both (Owen 2007, "The pigeonhole
    bootstrap"); the same seeds are drawn for all groups.

    Args:
        replicates: Number of bootstrap replicates.
        seed: Seed of all draws.
        confidence: Coverage of the intervals.
        blocks: Number of training seeds in a column.
    """

    def __init__(self, replicates: int = 10_000, seed: int = 0, confidence: float = 0.95, blocks: int = 1) -> None:
        """See the class."""
        if replicates < 1 or blocks < 1:
            raise ValueError(f"replicates and blocks must be at least 1, got {replicates} and {blocks}")
        _z(confidence)
        self.replicates = replicates
        self.seed = seed
        self.confidence = confidence
        self.blocks = blocks
        self._counts: dict[tuple[str, int], NDArray[np.uint16]] = {}

    def counts(self, group: str, n: int) -> NDArray[np.uint16]:
        """How often each item is drawn: shape (replicates, n), rows summing to n."""
        if self.blocks > 1:
            seeds, items = self._drawn("seeds", self.blocks), self._drawn(group, n // self.blocks)
            return (seeds[:, :, None] * items[:, None, :]).reshape(self.replicates, n)
        return self._drawn(group, n)

    def one_block(self) -> Bootstrap:
        """The plan for one training seed alone."""
        return Bootstrap(self.replicates, self.seed, self.confidence)

    def _drawn(self, group: str, n: int) -> NDArray[np.uint16]:
        if (group, n) not in self._counts:
            key = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")
            generator = np.random.default_rng(np.random.SeedSequence([self.seed, key]))
            counts = np.empty((self.replicates, n), dtype=np.uint16)
            step = max(1, _CELLS // n)
            for start in range(0, self.replicates, step):
                rows = counts[start : start + step]
                rows[:] = generator.multinomial(n, np.full(n, 1.0 / n), size=len(rows))
            self._counts[group, n] = counts
        return self._counts[group, n]

    def means(self, group: str, columns: Array) -> Array:
        """Resampled means of one group's columns.

        Args:
            group: The group's name.
            columns: Scores, shape (models, items).

        Returns:
            Means, shape (replicates, models).
        """
        models, n = columns.shape
        counts = self.counts(group, n)
        step = max(1, _CELLS // n)
        means = np.empty((self.replicates, models))
        for start in range(0, self.replicates, step):
            means[start : start + step] = counts[start : start + step].astype(np.float64) @ columns.T / n
        return means

    def interval(self, statistic: Statistic, columns: Mapping[str, ArrayLike]) -> Interval:
        """Percentile interval of a statistic of the groups' means; see `paired_bootstrap`."""
        arrays = {group: np.atleast_2d(np.asarray(values, dtype=np.float64)) for group, values in columns.items()}
        n = sum(values.shape[1] for values in arrays.values())
        empty = [group for group, values in arrays.items() if values.shape[1] == 0]
        if empty or not arrays:
            return Interval.undefined(f"no items in {', '.join(empty)}" if empty else "no items")
        # Sums before division, as in the replicates: equal columns give bit-equal means.
        point = float(
            statistic({group: values.sum(1)[None, :] / values.shape[1] for group, values in arrays.items()})[0]
        )
        drawn = statistic({group: self.means(group, values) for group, values in arrays.items()})
        unusable = float(np.mean(np.isnan(drawn)))
        tail = (1 - self.confidence) / 2
        if math.isnan(point) or unusable > tail:
            return Interval.undefined(f"undefined in {unusable:.0%} of the bootstrap replicates", n)
        low, high = np.nanquantile(drawn, [tail, 1 - tail])
        return Interval(point, float(low), float(high), n)


def paired_bootstrap(
    statistic: Statistic,
    columns: Mapping[str, ArrayLike],
    replicates: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval over items, paired over models (Efron & Tibshirani 1993, ch. 13).

    Args:
        statistic: Takes group → means of shape (r, models) and returns the statistic of each row, shape (r,); NaN
            marks a replicate in which it is undefined.
        columns: Group → scores of shape (models, items) or (items,). Items of one group are drawn together for all
            models; groups are drawn independently.
        replicates: Number of replicates.
        seed: Seed of the draws.
        confidence: Coverage.

    Returns:
        The statistic with its limits; undefined where it is NaN on the data or in more replicates than one tail holds.
    """
    return Bootstrap(replicates, seed, confidence).interval(statistic, columns)


def mean_interval(scores: ArrayLike, bootstrap: Bootstrap | None = None, group: str = "items") -> Interval:
    """Mean of one model's scores: Wilson interval where every score is 0 or 1, bootstrap interval otherwise.

    Over several training seeds it is the bootstrap; where all scores are equal, and it would have no width, the
    interval of one seed's items.
    """
    bootstrap = bootstrap or Bootstrap()
    column = _column(scores)
    if column.size == 0:
        return Interval.undefined("no items")
    if bootstrap.blocks > 1 and _constant(column):
        one = mean_interval(column[: column.size // bootstrap.blocks], bootstrap.one_block(), group)
        return Interval(one.value, one.low, one.high, column.size)
    if _binary(column) and bootstrap.blocks == 1:
        return wilson(int(column.sum()), column.size, bootstrap.confidence)
    return bootstrap.interval(lambda means: means[group][:, 0], {group: column})


def paired_difference(first: ArrayLike, second: ArrayLike, bootstrap: Bootstrap | None = None) -> Interval:
    """Difference of two models' mean scores on the same items, first − second.

    For scores of 0 and 1 the limits are Newcombe's paired score interval (1998, Statistics in Medicine 17:2635,
    method 10: Wilson limits of both rates joined by their correlation), which keeps its width where both rates are
    0 or 1 and the bootstrap's width would vanish. Other scores, and several training seeds, get the paired bootstrap;
    seeds of which all give the same, the interval of one.
    """
    bootstrap = bootstrap or Bootstrap()
    one, two = _column(first), _column(second)
    n = _same_length(one, two)
    if n == 0:
        return Interval.undefined("no items")
    if bootstrap.blocks > 1 and _constant(one) and _constant(two):
        size = n // bootstrap.blocks
        found = paired_difference(one[:size], two[:size], bootstrap.one_block())
        return Interval(found.value, found.low, found.high, n)
    if not (_binary(one) and _binary(two)) or bootstrap.blocks > 1:
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


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Ratio where the denominator is positive, NaN elsewhere: no loss (or gain), nothing to relate to."""
    usable = denominator > _ZERO
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=usable)


def safety_recovery(
    realigned: ArrayLike, tuned: ArrayLike, aligned: ArrayLike, bootstrap: Bootstrap | None = None
) -> Interval:
    """R_s = (S_realigned − S_tuned) / (S_aligned − S_tuned) with a paired bootstrap interval.

    Args:
        realigned: 1 for each harmful question refused, else 0; shape (items,).
        tuned: The same items, the tuned model.
        aligned: The same items, the aligned model.
        bootstrap: The resampling plan.

    Returns:
        R_s, undefined with a reason where the data do not show that tuning lost any safety (S_aligned ≤ S_tuned in
        more replicates than one tail of the interval holds).
    """
    bootstrap = bootstrap or Bootstrap()
    columns = np.stack(_same_items(realigned, tuned, aligned))
    found = bootstrap.interval(
        lambda means: _ratio(
            means["harmful"][:, 0] - means["harmful"][:, 1], means["harmful"][:, 2] - means["harmful"][:, 1]
        ),
        {"harmful": columns},
    )
    if found.defined or columns.shape[1] == 0:
        return found
    _, lost, kept = columns.mean(1)
    return Interval.undefined(f"no safety lost to recover: aligned {kept:.1%}, tuned {lost:.1%}", found.n)


def _same_items(*columns: ArrayLike) -> list[Array]:
    arrays = [_column(column) for column in columns]
    _same_length(*arrays)
    return arrays


def utility_retention(
    realigned: Mapping[str, ArrayLike],
    tuned: Mapping[str, ArrayLike],
    aligned: Mapping[str, ArrayLike],
    bootstrap: Bootstrap | None = None,
) -> Interval:
    """R_u = (U_realigned − U_aligned) / (U_tuned − U_aligned), averaged over tasks, with a paired bootstrap interval.

    Args:
        realigned: Task → scores, shape (items,).
        tuned: Task → scores of the model tuned on that task, on the same items.
        aligned: Task → scores of the aligned model.
        bootstrap: The resampling plan; each task's items are drawn independently.

    Returns:
        The mean over tasks, undefined with a reason where the data do not show that tuning gained on one of them.
    """
    bootstrap = bootstrap or Bootstrap()
    columns = {task: np.stack(_same_items(realigned[task], tuned[task], aligned[task])) for task in realigned}
    if not columns or any(values.shape[1] == 0 for values in columns.values()):
        return Interval.undefined("no items")

    def mean_ratio(means: Mapping[str, Array]) -> Array:
        ratios = [_ratio(m[:, 0] - m[:, 2], m[:, 1] - m[:, 2]) for m in means.values()]
        mean: Array = np.stack(ratios).mean(axis=0)
        return mean

    found = bootstrap.interval(mean_ratio, columns)
    if found.defined:
        return found
    flat = [task for task, values in columns.items() if not bootstrap.interval(mean_ratio, {task: values}).defined]
    shown = "; ".join(
        f"{task}: tuned {columns[task][1].mean():.1%}, aligned {columns[task][2].mean():.1%}"
        for task in flat or columns
    )
    return Interval.undefined(f"no utility gained to retain ({shown})", found.n)


def over_refusal_added(model: ArrayLike, reference: ArrayLike, bootstrap: Bootstrap | None = None) -> Interval:
    """Harmless questions refused by the model minus those refused by the reference (tuned or aligned), as a share.

    Args:
        model: 1 for each harmless question refused, else 0; shape (items,).
        reference: The same items, the reference model.
        bootstrap: Gives the confidence; see `paired_difference`.
    """
    return paired_difference(model, reference, bootstrap)


def mcnemar_exact(first: ArrayLike, second: ArrayLike) -> McNemar:
    """Exact two-sided McNemar test on 0/1 scores of the same items (binomial on the discordant ones).

    Raises:
        ValueError: The lengths differ, or a score is neither 0 nor 1.
    """
    one, two = _same_items(first, second)
    if not (_binary(one) and _binary(two)):
        raise ValueError("McNemar's test needs scores of 0 and 1")
    only_first = int(np.sum((one == 1) & (two == 0)))
    only_second = int(np.sum((one == 0) & (two == 1)))
    trials = only_first + only_second
    tail = sum(math.comb(trials, k) for k in range(min(only_first, only_second) + 1))
    # Integers of any size, so that the quotient is exact for thousands of discordant items.
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**trials))


def minimum_detectable_difference(n: int, p: float, confidence: float = 0.95, power: float = 0.8) -> float:
    """Smallest difference from the rate `p` that a comparison of two models on `n` items each would detect.

    The two-proportion sample-size formula (Fleiss 1981, §3.2) solved for the difference, towards the farther end of
    [0, 1]. It treats the models as independent: pairing positively correlated models detects smaller differences.

    Returns:
        The difference as a share, NaN where even the largest one would not be detected.
    """
    if n < 1 or not 0 <= p <= 1 or not 0 < power < 1:
        raise ValueError(f"need n ≥ 1, 0 ≤ p ≤ 1 and 0 < power < 1, got n={n}, p={p}, power={power}")
    start = min(p, 1 - p)
    z_alpha, z_power = _z(confidence), NormalDist().inv_cdf(power)

    def excess(difference: float) -> float:
        other, middle = start + difference, start + difference / 2
        null = z_alpha * math.sqrt(2 * middle * (1 - middle) / n)
        spread = z_power * math.sqrt((start * (1 - start) + other * (1 - other)) / n)
        return difference - null - spread

    low, high = 0.0, 1 - start
    if excess(high) < 0:
        return math.nan
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return high
