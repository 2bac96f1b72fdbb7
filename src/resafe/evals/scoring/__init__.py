"""Stored responses judged by name: one judge or several, with rates, agreement and comparisons."""

from resafe.evals.scoring.responses import Response, read_responses
from resafe.evals.scoring.run import (
    Named,
    Rate,
    agreements,
    comparisons,
    corrected_share,
    estimates,
    make_judges,
    rates,
    score,
    yes_or_no,
)

__all__ = [
    "Named",
    "Rate",
    "Response",
    "agreements",
    "comparisons",
    "corrected_share",
    "estimates",
    "make_judges",
    "rates",
    "read_responses",
    "score",
    "yes_or_no",
]
