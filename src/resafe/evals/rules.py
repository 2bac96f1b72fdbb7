"""The rule judge `refusal` behind the seam of all judges; the rules are in `refusal.py`."""

from __future__ import annotations

from collections.abc import Sequence

from resafe.evals.judge import Judge, Judged, Verdict, judge_method
from resafe.evals.refusal import refusal


@judge_method(
    "refusal",
    title="Rules: does the response refuse? (nothing fitted)",
    source="agreement with XSTest's human labels (Röttger et al. 2024): docs/judges.md",
    measures="refusal",
)
def refusal_rules() -> Judge:
    """The rule judge; it reads only the response."""

    def judge(items: Sequence[Judged]) -> list[Verdict]:
        outcomes = [refusal(item.response) for item in items]
        return [Verdict(outcome, float(outcome == "refused"), "") for outcome in outcomes]

    return judge
