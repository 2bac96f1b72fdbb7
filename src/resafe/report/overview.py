"""What the page says and draws, before it is markup: the headline, its rails, the panels and the heat table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from resafe.evals.records import Record
from resafe.evals.statistics import Interval, wilson
from resafe.report.numbers import MISSING, decimal, limits, percent, share
from resafe.report.plot import Chart, Mark, scatter
from resafe.report.results import Results, Row


@dataclass(frozen=True)
class Stop:
    """A mark on a rail: position and interval ends in % of the rail's length, and the figure in words."""

    role: str
    text: str
    at: float
    low: float
    high: float


@dataclass(frozen=True)
class Rail:
    """One measure of the headline model: the figure, its interval in words, and where the three models stand."""

    title: str
    figure: str
    unit: str
    detail: str
    scale: str
    stops: tuple[Stop, ...]


@dataclass(frozen=True)
class Panel:
    """One scatter chart: models measured on the same tasks, wide and narrow."""

    tasks: tuple[str, ...]
    wide: Chart
    narrow: Chart


@dataclass(frozen=True)
class Cell:
    """One model on one topic.

    Attributes:
        asked: Questions of the topic.
        refused: Share of the scored answers that refuse, with Wilson limits; its `n` is the number of scored ones.
    """

    asked: int
    refused: Interval


@dataclass(frozen=True)
class Heat:
    """Refusals by topic on one side.

    Attributes:
        side: "harmful" or "harmless".
        topics: For each topic its name and a cell a model; None where the model was not asked.
    """

    side: str
    topics: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def headline(results: Results) -> list[tuple[str, str]]:
    """The result in a sentence, as (text, role) pieces; the role names the colour of a piece or is empty."""
    if not results.headline:
        return [(f"{len(results.rows)} models compared on the same questions.", "")]
    row = results.row(results.headline)
    recovery, retention, added = row.safety_recovery, row.utility_retention, row.over_refusal_added
    if recovery.defined:
        start = [(row.model, "realigned"), (f" {_verb(recovery)} ", ""), (f"{percent(recovery.value)} %", "realigned")]
        start.append((" of the safety that fine-tuning took", ""))
    else:
        start = [(row.model, "realigned"), (f": {recovery.reason}", "")]
    if retention.defined:
        start += [(", keeps ", ""), (f"{percent(retention.value)} %", "realigned"), (" of what it taught", "")]
    if added.defined:
        points = math.floor(abs(added.value) * 100 + 0.5)
        more = "more" if added.value > 0 else "fewer"
        text = f"{points} % {more}" if points else "no more"
        start += [(", and refuses ", ""), (text, "realigned"), (" harmless questions than the tuned model", "")]
        if points:
            start[-2] = (f"{points} point{'s' if points > 1 else ''} {more}", "realigned")
    return [*start, (".", "")]


def _verb(recovery: Interval) -> str:
    return "wins back" if recovery.value > 0 else "recovers"


def rails(results: Results) -> list[Rail]:
    """The four measures of the headline model against the aligned and the tuned one; empty without a headline."""
    if not results.headline:
        return []
    row = results.row(results.headline)
    trio = [(role, results.row(name)) for role, name in (("tuned", row.tuned), ("aligned", row.aligned)) if name]
    trio.append(("realigned", row))
    same = [(role, other) for role, other in trio if set(row.utility_by_task) <= set(other.utility_by_task)]
    against = f"{share(row.over_refusal_vs_aligned, signed=True)} against the aligned model"
    return [
        Rail(
            "Safety recovered",
            percent(row.safety_recovery.value),
            "%",
            _within(row.safety_recovery),
            "harmful questions refused",
            _stops((role, other.harmful_refused) for role, other in trio),
        ),
        Rail(
            "Utility retained",
            percent(row.utility_retention.value),
            "%",
            _within(row.utility_retention),
            "task score" if len(row.utility_by_task) < 2 else "task score, mean of tasks",
            _stops((role, _on(other, tuple(row.utility_by_task))) for role, other in same if row.utility_by_task),
        ),
        Rail(
            "Over-refusal added",
            percent(row.over_refusal_added.value, signed=True),
            "points",
            "; ".join(filter(None, (_within(row.over_refusal_added, signed=True), against))),
            "harmless questions refused",
            _stops((role, other.harmless_refused) for role, other in trio),
        ),
        _perplexity(row, trio),
    ]


def _within(interval: Interval, signed: bool = False) -> str:
    if not interval.defined:
        return interval.reason
    within = limits(interval, signed)
    return f"interval {within}" if within else ""


def _stops(measured: Iterable[tuple[str, Interval]]) -> tuple[Stop, ...]:
    found = []
    for role, interval in measured:
        if interval.defined:
            scaled = [100 * min(1.0, max(0.0, v)) for v in (interval.value, interval.low, interval.high)]
            found.append(Stop(role, f"{percent(interval.value)} %", *scaled))
    return tuple(found)


def _on(row: Row, tasks: tuple[str, ...]) -> Interval:
    """Utility over the given tasks: the row's own where they are all its tasks, else the mean without limits."""
    if set(tasks) == set(row.utility_by_task):
        return row.utility
    chosen = [row.utility_by_task[task] for task in tasks]
    if len(chosen) == 1:
        return chosen[0]
    value = sum(interval.value for interval in chosen) / len(chosen)
    return Interval(value, value, value, sum(interval.n for interval in chosen))


def _perplexity(row: Row, trio: Sequence[tuple[str, Row]]) -> Rail:
    known = [(role, other.perplexity) for role, other in trio if not math.isnan(other.perplexity)]
    top = 1.25 * max((value for _, value in known), default=1.0)
    stops = tuple(Stop(role, decimal(v), 100 * v / top, 100 * v / top, 100 * v / top) for role, v in known)
    tuned = dict(known).get("tuned", math.nan)
    detail = (
        "" if math.isnan(tuned) else f"{percent(row.perplexity / tuned - 1, signed=True)} % against the tuned model"
    )
    detail = detail if MISSING not in detail else ""
    return Rail("Perplexity", decimal(row.perplexity), "", detail, "plain text, lower is better", stops)


def panels(results: Results) -> list[Panel]:
    """One panel for each set of tasks that a realigned or baseline model was measured on, the largest panel first."""
    made = [row for row in results.rows if row.kind in ("realigned", "baseline")] or list(results.rows)
    wanted = dict.fromkeys(tuple(sorted(row.utility_by_task)) for row in made if row.utility.defined)
    found = []
    for tasks in wanted:
        marks = [
            Mark(row.model, row.kind, _on(row, tasks), row.harmful_refused, row.model == results.headline)
            for row in results.rows
            if _belongs(row, tasks) and row.harmful_refused.defined
        ]
        if marks:
            wide, narrow = scatter(marks, 1100, 540), scatter(marks, 380, 440, numbered=True)
            found.append(Panel(tasks, wide, narrow))
    return sorted(found, key=lambda panel: -len(panel.wide.marks))


def _belongs(row: Row, tasks: tuple[str, ...]) -> bool:
    if row.kind in ("base", "aligned", "tuned"):
        return set(tasks) <= set(row.utility_by_task)
    return set(tasks) == set(row.utility_by_task)


def heat(results: Results, records: Sequence[Record]) -> list[Heat]:
    """Share refused by topic and model on each side; a side with fewer than two topics is left out."""
    names = [row.model for row in results.rows]
    tables = []
    for side in ("harmful", "harmless"):
        outcomes: dict[str, dict[str, list[str]]] = {}
        for record in records:
            if record.side == side and record.topic:
                outcomes.setdefault(record.topic, {}).setdefault(record.model, []).append(record.outcome)
        topics = tuple(
            (topic.replace("_", " "), tuple(_cell(of[name], results) if name in of else None for name in names))
            for topic, of in sorted(outcomes.items())
        )
        if len(topics) > 1:
            tables.append(Heat(side, topics))
    return tables


def _cell(outcomes: Sequence[str], results: Results) -> Cell:
    """A broken answer is scored, and no refusal; an answer with another outcome is not scored."""
    scored = [outcome for outcome in outcomes if outcome in ("refused", "answered", "broken")]
    return Cell(len(outcomes), wilson(scored.count("refused"), len(scored), results.confidence))
