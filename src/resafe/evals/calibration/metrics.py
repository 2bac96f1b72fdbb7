"""How far a judge agrees with people, from two columns of yes and no, with intervals by drawing prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from resafe.evals.statistics import Array, Bootstrap, Interval, JudgeErrors, kappa_of_tables, tables_by_group

MEASURES = ("accuracy", "precision", "recall", "specificity", "f1", "kappa")
"""The figures of an agreement, in the order of tables."""


@dataclass(frozen=True)
class Agreement:
    """A judge against people on some rows. "Yes" is a refusal, or a harmful response.

    Attributes:
        asked: Rows that were given to the judge.
        n: Rows that it judged; all figures are of these.
        undetermined: Rows of `n` on which the judge could not decide; they count as no, as in reports.
        positives: Rows of `n` that people call yes.
        prompts: Distinct prompts of `n`.
        accuracy: Share of rows on which they agree.
        precision: Share of the judge's yes that people call yes.
        recall: Share of people's yes that the judge calls yes.
        specificity: Share of people's no that the judge calls no.
        f1: Harmonic mean of precision and recall.
        kappa: Cohen's κ.
        recall_n: The rows that the recall rests on, as independent ones: its variance over draws of prompts is that
            of so many independent rows.
        specificity_n: The same for the specificity.
    """

    asked: int
    n: int
    undetermined: int
    positives: int
    prompts: int
    accuracy: Interval
    precision: Interval
    recall: Interval
    specificity: Interval
    f1: Interval
    kappa: Interval
    recall_n: float
    specificity_n: float

    @property
    def errors(self) -> JudgeErrors | None:
        """How the judge errs, for correcting rates; None where a label is missing among the rows."""
        if not (self.recall.defined and self.specificity.defined):
            return None
        return JudgeErrors(self.recall.value, self.recall_n, self.specificity.value, self.specificity_n)


def agreement(
    human: Sequence[bool],
    judge: Sequence[bool | None],
    prompts: Sequence[str],
    bootstrap: Bootstrap | None = None,
    *,
    asked: int | None = None,
    undetermined: int = 0,
) -> Agreement:
    """Compares a judge with people.

    Args:
        human: What people say, one a row.
        judge: What the judge says; None where it gave no verdict: those rows are left out.
        prompts: The prompt of each row; rows with one prompt are drawn together.
        bootstrap: The resampling plan.
        asked: Rows that the judge was given; None: as many as there are.
        undetermined: For the record: how many of the judge's no are "cannot tell".

    Returns:
        The figures; each is undefined where there is nothing to divide by.
    """
    kept = [n for n, said in enumerate(judge) if said is not None]
    people, said = [bool(human[n]) for n in kept], [bool(judge[n]) for n in kept]
    # Both labels first, so that every table has the cells (no, no), (no, yes), (yes, no), (yes, yes).
    tables = tables_by_group([False, True, *people], [False, True, *said], ["\0", "\0", *(prompts[n] for n in kept)])
    tables = tables[1:]
    plan = bootstrap or Bootstrap()
    found = {name: _interval(_FORMULAS[name], tables, plan, len(kept)) for name in MEASURES}
    return Agreement(
        asked=len(human) if asked is None else asked,
        n=len(kept),
        undetermined=undetermined,
        positives=sum(people),
        prompts=len(tables),
        **found,
        recall_n=_independent(found["recall"], tables[:, 1].sum(), _FORMULAS["recall"], tables, plan),
        specificity_n=_independent(found["specificity"], tables[:, 0].sum(), _FORMULAS["specificity"], tables, plan),
    )


def _ratio(numerator: Array, denominator: Array) -> Array:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 1e-12)


_FORMULAS: dict[str, Callable[[Array], Array]] = {
    "accuracy": lambda t: _ratio(t[:, 0, 0] + t[:, 1, 1], t.sum((1, 2))),
    "precision": lambda t: _ratio(t[:, 1, 1], t[:, :, 1].sum(1)),
    "recall": lambda t: _ratio(t[:, 1, 1], t[:, 1].sum(1)),
    "specificity": lambda t: _ratio(t[:, 0, 0], t[:, 0].sum(1)),
    "f1": lambda t: _ratio(2 * t[:, 1, 1], t[:, 1].sum(1) + t[:, :, 1].sum(1)),
    "kappa": kappa_of_tables,
}
"""Statistics of tables of shape (r, people, judge)."""


def _interval(formula: Callable[[Array], Array], tables: Array, plan: Bootstrap, n: int) -> Interval:
    found = plan.interval(
        lambda means: formula(means["prompts"].reshape(-1, 2, 2)), {"prompts": tables.reshape(len(tables), 4).T}
    )
    return replace(found, n=n)


def _independent(
    share: Interval, rows: float, formula: Callable[[Array], Array], tables: Array, plan: Bootstrap
) -> float:
    """Share × rest / variance over draws, at most the rows; without spread, the prompts that have such rows."""
    if not share.defined:
        return 0.0
    p = share.value
    drawn = formula(plan.means("prompts", tables.reshape(len(tables), 4).T).reshape(-1, 2, 2))
    variance = float(np.nanvar(drawn))
    if variance <= 0 or p in (0.0, 1.0):
        side = 1 if formula is _FORMULAS["recall"] else 0
        return float((tables[:, side].sum(1) > 0).sum())
    found = p * (1 - p) / variance
    return float(min(rows, found)) if math.isfinite(found) else float(rows)
