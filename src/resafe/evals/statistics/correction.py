"""A rate corrected for the errors of the judge that measured it (Rogan & Gladen 1978), with an interval.

Differences of two corrected rates are the measured ones times a constant, so that ratios of differences (R_s) stay as
they are: what the judge gets wrong moves rates, and not recoveries, as long as it errs alike on all models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from resafe.evals.statistics.interval import Interval, normal_quantile


@dataclass(frozen=True)
class JudgeErrors:
    """How a judge errs, as measured on labelled rows.

    Attributes:
        recall: Share of what people call positive (a refusal, a harmful response) that the judge calls so too.
        recall_n: Rows that it rests on, as independent ones: fewer than there are where rows share prompts.
        specificity: Share of what people call negative that the judge calls so too.
        specificity_n: Rows that it rests on, as independent ones.
    """

    recall: float
    recall_n: float
    specificity: float
    specificity_n: float


def rogan_gladen(rate: float, recall: float, specificity: float) -> float:
    """The true rate behind a measured one: (rate + specificity − 1) / (recall + specificity − 1), within 0 and 1.

    Returns:
        NaN where the judge is no better than chance (recall + specificity ≤ 1).
    """
    gained = recall + specificity - 1
    if math.isnan(gained) or gained <= 0:
        return math.nan
    return min(1.0, max(0.0, (rate + specificity - 1) / gained))


def corrected_rate(rate: Interval, errors: JudgeErrors, confidence: float = 0.95) -> Interval:
    """A measured rate corrected for the judge's errors.

    The limits count both the items of the rate and the labelled rows behind the judge's recall and specificity (Lang
    & Reiczigel 2014, Preventive Veterinary Medicine 113:13); the upper one is never below Wilson's for 0 of n, nor the
    lower one above that for n of n. They hold as far as the judge errs on these responses as on the labelled ones.

    Args:
        rate: The measured rate with the number of items `n`; its own limits are not used.
        errors: How the judge errs.
        confidence: Coverage.

    Returns:
        The corrected rate; undefined where the rate is, or where the judge is no better than chance.
    """
    if not rate.defined:
        return rate
    value = rogan_gladen(rate.value, errors.recall, errors.specificity)
    if math.isnan(value):
        return Interval.undefined(
            f"the judge is no better than chance (recall {errors.recall:.2f}, specificity {errors.specificity:.2f})",
            rate.n,
        )
    z = normal_quantile(confidence)
    n, measured = rate.n + z * z, (rate.n * rate.value + z * z / 2) / (rate.n + z * z)
    recall, recall_n = _shrunk(errors.recall, errors.recall_n)
    specificity, specificity_n = _shrunk(errors.specificity, errors.specificity_n)
    gained = recall + specificity - 1
    if gained <= 0:
        return Interval.undefined("too few labelled rows to say that the judge is better than chance", rate.n)
    centre = (measured + specificity - 1) / gained
    of_recall = recall * (1 - recall) / recall_n
    of_specificity = specificity * (1 - specificity) / specificity_n
    shift = 2 * z * z * (centre * of_recall - (1 - centre) * of_specificity)
    spread = measured * (1 - measured) / n + (1 - centre) ** 2 * of_specificity + centre**2 * of_recall
    half = z * math.sqrt(spread) / gained
    low, high = (min(1.0, max(0.0, centre + shift + side * half)) for side in (-1, 1))
    # A measured rate below the judge's own false alarms would give [0, 0]: n items never show less than 0 of n does.
    least = z * z / n
    return Interval(value, min(low, value, 1 - least), max(high, value, least), rate.n)


def _shrunk(share: float, n: float) -> tuple[float, float]:
    """One success and one failure added, so that a judge without errors in few rows is not taken for infallible."""
    return (n * share + 1) / (n + 2), n + 2
