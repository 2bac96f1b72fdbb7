"""A number of items dealt to groups by weight. Knows no data."""

from __future__ import annotations

from collections.abc import Mapping


def dealt(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` items divided over groups in proportion to their weights: largest remainders first, ties by name.

    Args:
        weights: Group → weight, not all zero.
        total: Items.
    """
    whole = sum(weights.values())
    exact = {name: weight * total / whole for name, weight in weights.items()}
    counts = {name: int(part) for name, part in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
