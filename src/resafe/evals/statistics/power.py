"""What a comparison of this size could have found."""

from __future__ import annotations

import math
from statistics import NormalDist

from resafe.evals.statistics.interval import normal_quantile


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
    z_alpha, z_power = normal_quantile(confidence), NormalDist().inv_cdf(power)

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
