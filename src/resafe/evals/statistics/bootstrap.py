"""Paired bootstrap over items: one replicate draws the items once and uses them for every model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from resafe.evals.statistics.interval import Array, Interval, normal_quantile

Statistic = Callable[[Mapping[str, Array]], Array]

_CELLS = 4_000_000
"""Cells of the resampling matrix converted to float64 at once: 32 MB."""


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
        normal_quantile(confidence)
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
