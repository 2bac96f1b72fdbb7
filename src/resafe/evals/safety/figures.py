"""Rates of an evaluation of safety: a row a judge, set and model, and the same for each topic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resafe.evals.judge import (
    ANSWERED,
    BROKEN,
    HARMFUL,
    HARMLESS,
    PARTIAL,
    REFUSED,
    UNDETERMINED,
    UNSCORED,
    Measure,
    Verdict,
)
from resafe.evals.safety.result import Answer, SafetyResult
from resafe.evals.scoring import Named, corrected_share, yes_or_no
from resafe.evals.statistics import Interval, mcnemar_exact, paired_difference, wilson

OUTCOMES: dict[str, tuple[str, ...]] = {
    "refusal": (REFUSED, PARTIAL, ANSWERED, UNDETERMINED, BROKEN, UNSCORED),
    "harm": (HARMFUL, HARMLESS, REFUSED, BROKEN, UNSCORED),
    "preference": ("won", "tie", "lost", BROKEN, UNSCORED),
}
"""The outcomes that a judge of each measure gives, in the order of the tables."""
YES = {"refusal": "refuses", "harm": "harmful", "preference": "less harmful"}
"""What the rate is the share of: of refusals, whole or partial; or of harmful answers."""


@dataclass(frozen=True)
class Figure:
    """One judge's figures of one model on one set, or on one topic of it.

    Attributes:
        judge: The judge's name.
        measure: What it measures.
        set: The set with its wrapper.
        side: "harmful" or "harmless".
        topic: The topic; empty for the whole set.
        model: The model.
        asked: Questions.
        scored: Answers on which the judge said yes or no; neither unscored nor undetermined.
        rate: Share of the scored ones that are refusals, whole or partial (or harmful), with Wilson limits.
        outcomes: Outcome → its share of all that were asked, with Wilson limits.
        difference: Rate minus that of the first model on the questions on which both are scored, with its paired
            score interval; None for the first model.
        p_value: Exact McNemar of that difference; None for the first model, or without pairs.
        corrected: The rate corrected for the judge's errors; None where that was not asked for.
    """

    judge: str
    measure: Measure
    set: str
    side: str
    topic: str
    model: str
    asked: int
    scored: int
    rate: Interval
    outcomes: dict[str, Interval]
    difference: Interval | None = None
    p_value: float | None = None
    corrected: Interval | None = None


def figures(result: SafetyResult, *, topics: bool = False) -> list[Figure]:
    """The figures of all judges, sets and models; with `topics`, of each topic in place of the whole sets."""
    found = []
    for named in result.judges:
        rows = list(zip(result.answers, result.verdicts[named.name], strict=True))
        groups: dict[tuple[str, str, str], list[tuple[Answer, Verdict]]] = {}
        for answer, verdict in rows:
            key = (answer.label, answer.side, (answer.topic or "–") if topics else "")
            groups.setdefault(key, []).append((answer, verdict))
        for (label, side, topic), members in sorted(groups.items(), key=_place(list(groups))):
            found += _models(named, label, side, topic, members, result)
    return found


def _place(keys: Sequence[tuple[str, str, str]]):  # type: ignore[no-untyped-def]
    """Sets in their order, topics by name."""
    sets = {key[0]: place for place, key in reversed(list(enumerate(keys)))}
    return lambda item: (sets[item[0][0]], item[0][2])


def _models(
    named: Named, label: str, side: str, topic: str, members: Sequence[tuple[Answer, Verdict]], result: SafetyResult
) -> list[Figure]:
    models = result.models
    said: dict[str, dict[str, bool | None]] = {}
    verdicts: dict[str, list[Verdict]] = {}
    values = yes_or_no(named, [verdict for _, verdict in members])
    for (answer, verdict), value in zip(members, values, strict=True):
        said.setdefault(answer.model, {})[answer.id] = value
        verdicts.setdefault(answer.model, []).append(verdict)
    first = said.get(models[0], {})
    found = []
    for model in models:
        mine = [value for value in said[model].values() if value is not None]
        asked = len(verdicts[model])
        shares = {
            outcome: wilson(sum(verdict.outcome == outcome for verdict in verdicts[model]), asked)
            for outcome in OUTCOMES[named.measure]
        }
        difference, p_value = (None, None) if model == models[0] else _against(said[model], first)
        rate = wilson(sum(mine), len(mine))
        found.append(
            Figure(
                named.name, named.measure, label, side, topic, model, asked, len(mine), rate, shares, difference,
                p_value, corrected_share(named, verdicts[model]) if result.corrected else None,
            )
        )  # fmt: skip
    return found


def _against(mine: dict[str, bool | None], first: dict[str, bool | None]) -> tuple[Interval, float | None]:
    """The paired difference, and McNemar's p."""
    both = [key for key in mine if mine[key] is not None and first.get(key) is not None]
    if not both:
        return Interval.undefined("no question on which both are scored"), None
    ours, theirs = ([float(bool(side[key])) for key in both] for side in (mine, first))
    return paired_difference(ours, theirs), mcnemar_exact(ours, theirs).p_value
