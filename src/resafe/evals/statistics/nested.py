"""Bootstrap over seeds and prompts: what would change with other training seeds and with other questions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from resafe.evals.statistics.interval import Array, Interval, normal_quantile

_PIECE = 500  # replicates at once


def nested_bootstrap(
    scores: ArrayLike,
    statistic: Callable[[Array], Array] | None = None,
    replicates: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of a statistic of models that were trained with several seeds and asked the same prompts.

    A replicate draws seeds with replacement, then prompts with replacement; every drawn seed, and every model, is seen
    on the same draw of prompts, since they were asked the same ones. (Drawing prompts anew for every seed would
    average their luck away: the interval would be too short.) With few seeds the interval is a lower bound of the
    true width: three seeds say little of how seeds vary.

    Args:
        scores: Shape (seeds, prompts), or (models, seeds, prompts); models are paired by seed and prompt.
        statistic: Takes means of shape (r, models) and returns shape (r,); None: the one model's mean, or the first
            model's minus the second's where there are two.
        replicates: Number of replicates.
        seed: Seed of the draws.
        confidence: Coverage.

    Returns:
        The statistic of all scores, with its limits; `n` is the number of prompts.

    Raises:
        ValueError: Another shape, or no statistic for three models.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3:
        raise ValueError(f"scores must have the shape (models, seeds, prompts), got {values.shape}")
    normal_quantile(confidence)
    models, seeds, prompts = values.shape
    chosen = statistic or _default(models)
    if 0 in values.shape:
        return Interval.undefined("no seeds or no prompts")
    generator = np.random.default_rng(seed)
    drawn = np.empty(replicates)
    for start in range(0, replicates, _PIECE):
        size = min(_PIECE, replicates - start)
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
        of_prompts = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=size) / prompts
        by_seed = np.einsum("rp,msp->rms", of_prompts, values, optimize=True)
        drawn[start : start + size] = chosen(np.einsum("rs,rms->rm", of_seeds, by_seed))
    point = float(chosen(values.mean(axis=(1, 2))[None])[0])
    tail = (1 - confidence) / 2
    if math.isnan(point) or float(np.mean(np.isnan(drawn))) > tail:
        return Interval.undefined("undefined on the data or in too many replicates", prompts)
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Interval(point, float(low), float(high), prompts)


def _default(models: int) -> Callable[[Array], Array]:
    if models == 1:
        return lambda means: means[:, 0]
    if models == 2:
        return lambda means: means[:, 0] - means[:, 1]
    raise ValueError(f"{models} models need a statistic that says how they are compared")
