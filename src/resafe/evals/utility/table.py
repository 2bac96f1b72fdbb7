"""The figures of an evaluation of utility as a table: a row a task and metric, a column a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from resafe.evals.statistics import paired_difference
from resafe.evals.utility.results import TaskScore, UtilityResult

if TYPE_CHECKING:
    from rich.table import Table


def rows(results: list[UtilityResult]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: value ± standard error; models after the first with the paired difference and its interval.

    The difference is of the same items, with the 95 % paired score interval of `evals.statistics`.
    """
    heads = ["task", "metric", "n"] + [result.model for result in results]
    found: dict[tuple[str, str, str], list[TaskScore | None]] = {}
    for place, result in enumerate(results):
        for score in result.scores:
            line = found.setdefault((score.task, score.metric, score.filter), [None] * len(results))
            line[place] = score
    table = []
    for (task, metric, chosen), line in found.items():
        label = metric if chosen in ("none", "create_test") else f"{metric} ({chosen})"
        counted = next(score.n for score in line if score)
        cells = [_cell(line, results, place) for place in range(len(line))]
        table.append([task, label, str(counted), *cells])
    return heads, table


def _cell(line: Sequence[TaskScore | None], results: list[UtilityResult], place: int) -> str:
    score = line[place]
    if score is None:
        return "–"
    text = f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")
    difference = _difference(score, line[0], results[place], results[0]) if place and line[0] else ""
    return f"{text} ({difference})" if difference else text


def _difference(score: TaskScore, base: TaskScore, result: UtilityResult, first: UtilityResult) -> str:
    """The difference to the first model on the items that both have, where the metric is that of the items."""
    names = {score.task, f"{score.task}:{score.filter}"}
    ours = {(r.set, r.id): r.score for r in result.records if r.set in names}
    theirs = {(r.set, r.id): r.score for r in first.records if r.set in names}
    shared = [key for key in ours if key in theirs]
    if not shared or not (_scored_by(ours, score) and _scored_by(theirs, base)):
        return ""
    found = paired_difference([ours[key] for key in shared], [theirs[key] for key in shared])
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _scored_by(items: Mapping[Any, float], score: TaskScore) -> bool:
    """Whether the items' scores are of this metric: a task with two has the items of one."""
    return abs(sum(items.values()) / len(items) - score.value) <= 1e-9


def markdown_text(results: list[UtilityResult]) -> str:
    """As Markdown."""
    heads, cells = rows(results)
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rich_text(results: list[UtilityResult]) -> Table:
    """As a table for the terminal."""
    from rich.table import Table

    heads, cells = rows(results)
    table = Table(caption="± standard error; in brackets: difference to the first model on the same items, 95 %")
    for head in heads:
        table.add_column(head, overflow="fold")
    for line in cells:
        table.add_row(*line)
    return table
