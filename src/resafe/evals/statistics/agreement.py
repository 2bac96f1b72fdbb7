"""Agreement beyond chance: Cohen's κ of two raters, Krippendorff's α of several, intervals by drawing groups."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from resafe.evals.statistics.bootstrap import Bootstrap
from resafe.evals.statistics.interval import Array, Interval


def group_numbers(groups: Sequence[Hashable]) -> NDArray[np.int64]:
    """The groups numbered from 0 in the order in which they first occur."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def tables_by_group(first: Sequence[Hashable], second: Sequence[Hashable], groups: Sequence[Hashable]) -> Array:
    """Contingency tables of two raters, one a group: shape (groups, k, k) with k labels in sorted order of their text.

    Raises:
        ValueError: The lengths differ.
    """
    if not len(first) == len(second) == len(groups):
        raise ValueError(f"{len(first)} and {len(second)} labels of {len(groups)} rows: they must be of the same rows")
    labels = {label: place for place, label in enumerate(sorted({*first, *second}, key=str))}
    numbers = group_numbers(groups)
    tables = np.zeros((int(numbers.max(initial=-1)) + 1, len(labels), len(labels)))
    rows = np.array([labels[label] for label in first], dtype=np.int64)
    columns = np.array([labels[label] for label in second], dtype=np.int64)
    np.add.at(tables, (numbers, rows, columns), 1.0)
    return tables


def kappa_of_tables(tables: Array) -> Array:
    """Cohen's κ of contingency tables of shape (…, k, k); NaN where both raters always gave the same one label."""
    total = tables.sum(axis=(-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        agreed = np.trace(tables, axis1=-2, axis2=-1) / total
        chance = (tables.sum(-1) * tables.sum(-2)).sum(-1) / total**2
        kappa: Array = np.where(chance < 1, (agreed - chance) / (1 - chance), np.nan)
    return kappa


def cohen_kappa(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    bootstrap: Bootstrap | None = None,
) -> Interval:
    """Cohen's κ (1960) of two raters of the same rows, with an interval by drawing groups of rows.

    Args:
        first: One label a row.
        second: The other rater's.
        groups: What is drawn together, such as the prompt of each row; None: each row is its own group.
        bootstrap: The resampling plan.

    Returns:
        κ; undefined where all labels are one. `n` counts rows.
    """
    tables = tables_by_group(first, second, range(len(first)) if groups is None else groups)
    labels = tables.shape[-1]
    if not len(first):
        return Interval.undefined("no items")
    found = (bootstrap or Bootstrap()).interval(
        lambda means: kappa_of_tables(means["rows"].reshape(-1, labels, labels)),
        {"rows": tables.reshape(len(tables), -1).T},
    )
    return replace(found, n=len(first), reason=found.reason and f"all labels are one, or nearly: {found.reason}")


def krippendorff_alpha(
    ratings: Sequence[Sequence[Hashable | None]],
    groups: Sequence[Hashable] | None = None,
    bootstrap: Bootstrap | None = None,
) -> Interval:
    """Krippendorff's α for nominal labels (Krippendorff 2011), with an interval by drawing groups of items.

    Args:
        ratings: For each rater one label an item, None where there is none; shape (raters, items).
        groups: What is drawn together; None: each item is its own group.
        bootstrap: The resampling plan.

    Returns:
        α over the items that two or more raters labelled (their number is `n`); undefined where there are none, or
        where all labels are one.
    """
    items = len(ratings[0]) if ratings else 0
    if any(len(row) != items for row in ratings):
        raise ValueError("every rater must have as many labels as there are items")
    labels = sorted({label for row in ratings for label in row if label is not None}, key=str)
    counts = np.array([[sum(r[i] == label for r in ratings) for label in labels] for i in range(items)], dtype=float)
    counts = counts.reshape(items, len(labels))
    several = counts.sum(1) > 1
    if not several.any():
        return Interval.undefined("no item was labelled by two")
    counts = counts[several]
    given = counts.sum(1)
    disagreeing = (given**2 - (counts**2).sum(1)) / (given - 1)
    drawn = np.arange(items) if groups is None else group_numbers(groups)
    numbers = group_numbers(drawn[several].tolist())
    sums = np.zeros((int(numbers.max()) + 1, len(labels) + 1))
    np.add.at(sums, numbers, np.column_stack([disagreeing, counts]))

    def alpha(means: Array) -> Array:
        total = means * len(sums)
        n, by_label = total[:, 1:].sum(1), total[:, 1:]
        expected = (n**2 - (by_label**2).sum(1)) / (n - 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Array = np.where(expected > 1e-9, 1 - total[:, 0] / expected, np.nan)
        return found

    found = (bootstrap or Bootstrap()).interval(lambda means: alpha(means["items"]), {"items": sums.T})
    return replace(found, n=int(several.sum()))
