"""Frontiers of (safety, utility) points: which strengths of which methods no other one beats on both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def frontier(points: ArrayLike) -> list[int]:
    """Indices of the non-dominated points, both coordinates to be maximised, ordered by the first coordinate.

    Args:
        points: (safety, utility) pairs, shape (n, 2). Of equal points the first one is kept; NaN never dominates.
    """
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    usable = [i for i in range(len(array)) if not np.isnan(array[i]).any()]
    best, kept = -math.inf, list[int]()
    for index in sorted(usable, key=lambda i: (-array[i, 0], -array[i, 1], i)):
        if array[index, 1] > best:
            best = float(array[index, 1])
            kept.append(index)
    return kept[::-1]


def hypervolume(points: ArrayLike, reference: Sequence[float] = (0.0, 0.0)) -> float:
    """Area dominated by the points above the reference, both coordinates to be maximised (Zitzler & Thiele 1998).

    Args:
        points: (safety, utility) pairs, shape (n, 2).
        reference: The worst acceptable pair; points below it in either coordinate add nothing.
    """
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2) - np.asarray(reference, dtype=np.float64)
    array = array[(array > 0).all(axis=1)]
    area, reached = 0.0, 0.0
    for index in frontier(array):
        area += (array[index, 0] - reached) * array[index, 1]
        reached = float(array[index, 0])
    return float(area)


def dominated_volume(points: ArrayLike) -> NDArray[np.float64]:
    """Volume of the union of the boxes [0, p_1] × … × [0, p_d] of several points, for many sets of points at once.

    The hypervolume above the origin for any number of measures, by inclusion and exclusion over subsets of points
    (Zitzler & Thiele 1998 define it; the sum has 2^k terms, so k is a handful: a method's strengths).

    Args:
        points: Shape (..., k, d): k points in d coordinates, all to be maximised; negative ones count as 0. A point
            with NaN adds nothing.

    Returns:
        Volumes, shape (...); NaN where all points have NaN.

    Raises:
        ValueError: There are more than 12 points.
    """
    array = np.asarray(points, dtype=np.float64)
    missing = np.asarray(np.isnan(array).any(axis=-1))[..., None]
    array = np.clip(np.where(missing & ~missing.all(axis=-2, keepdims=True), 0.0, array), 0.0, None)
    k = array.shape[-2]
    if k > 12:
        raise ValueError(f"{k} points have {2**k - 1} intersections; give at most 12")
    volume = np.zeros(array.shape[:-2])
    for size in range(1, k + 1):
        for chosen in combinations(range(k), size):
            common = array[..., chosen, :].min(axis=-2).prod(axis=-1)
            volume += common if size % 2 else -common
    return volume


def crossing(gains: ArrayLike, costs: ArrayLike, level: float) -> NDArray[np.float64]:
    """What it costs along each frontier to gain `level` for the first time; NaN where it never does.

    Along straight lines from (0, 0), which is to change nothing, through the points in their order: mixtures of two
    neighbours. A point with NaN is left out.

    Args:
        gains: Gain of each point, shape (r, n).
        costs: Cost of each point, shape (r, n).
        level: The gain, above 0.

    Returns:
        Costs, shape (r,).
    """
    columns = (np.asarray(values, dtype=np.float64).T for values in (gains, costs))
    reached = list(zip(*columns, strict=True))
    found = np.full(len(reached[0][0]), np.nan)
    gained, cost = np.zeros_like(found), np.zeros_like(found)
    for further, more in reached:
        known = ~np.isnan(further) & ~np.isnan(more)
        further, more = np.where(known, further, gained), np.where(known, more, cost)
        here = np.isnan(found) & (gained < level) & (further >= level)
        part = (level - gained) / np.where(here, further - gained, 1.0)
        found = np.where(here, cost + part * (more - cost), found)
        gained, cost = further, more
    return found
