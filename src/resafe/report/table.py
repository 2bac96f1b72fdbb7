"""The results as a table for the terminal (rich) and for markdown. Knows no files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from resafe.evals.statistics import Interval
from resafe.report.notes import notes, recall_note
from resafe.report.numbers import decimal, limits, percent, share
from resafe.report.results import Results, Row

STYLES = {"base": "magenta", "aligned": "blue", "tuned": "red", "realigned": "bold green", "baseline": "default"}
LEGEND = (
    "Shares in % with {confidence:.0f} % intervals, on {harmful} harmful, {harmless} harmless and {task} task items. "
    "Task score: the mean over a model's tasks, the aligned model's over all of them. R_s: safety recovered, R_u: "
    "utility retained; added: harmless questions refused, in points over the tuned model."
)


@dataclass(frozen=True)
class Column:
    """A column of figures: its heading, its heading in two lines for narrow tables, and its text for a row."""

    title: str
    short: str
    text: Callable[[Row], str]


BENCHMARK_LEGEND = (
    "Scores on tasks of lm-eval in %, with {confidence:.0f} % intervals; after the comma the change against the "
    "aligned model on the same items, in points."
)
COLUMNS = (
    Column("harmful refused", "harmful\nrefused", lambda row: share(row.harmful_refused)),
    Column("harmful answered", "harmful\nanswered", lambda row: share(row.harmful_answered)),
    Column("harmless refused", "harmless\nrefused", lambda row: share(row.harmless_refused)),
    Column("task score", "task\nscore", lambda row: share(row.utility)),
    Column("perplexity", "perpl.", lambda row: decimal(row.perplexity)),
    Column("R_s", "R_s", lambda row: share(row.safety_recovery)),
    Column("R_u", "R_u", lambda row: share(row.utility_retention)),
    Column("added over-refusal", "added", lambda row: share(row.over_refusal_added, signed=True)),
)


def _counted(results: Results, side: str) -> str:
    """Items that were scored, and of how many, where not all could be."""
    scored = results.items.get(side, 0)
    asked = results.asked.get(side, scored)
    return f"{scored}" if asked == scored else f"{scored} scored / {asked} asked"


def legend(results: Results) -> str:
    """One line that says what the table's figures are."""
    counts = {side: _counted(results, side) for side in ("harmful", "harmless", "task")}
    text = LEGEND.format(confidence=results.confidence * 100, **counts)
    if results.training_seeds:
        text += f" Pooled over {len(results.training_seeds)} training seeds; the intervals cover the choice of both."
    return text


def benchmarks(results: Results) -> list[str]:
    """The task sets of lm-eval that any model was measured on."""
    return list(dict.fromkeys(name for row in results.rows for name in row.benchmarks))


def benchmark_text(row: Row, name: str) -> str:
    """A score with its limits and its change: "52 [48–57], +1 [−2, +4]"; "–" where it was not measured."""
    if name not in row.benchmarks:
        return share(Interval.undefined(""))
    change = row.benchmark_changes.get(name)
    return share(row.benchmarks[name]) + (f", {_change(change)}" if change else "")


def _change(change: Interval) -> str:
    within = limits(change, signed=True)
    return percent(change.value, signed=True) + (f" [{within}]" if within else "")


def benchmark_table(results: Results) -> Table | None:
    """The tasks of lm-eval for the terminal; None where none were measured."""
    names = benchmarks(results)
    if not names:
        return None
    caption = BENCHMARK_LEGEND.format(confidence=results.confidence * 100)
    shown = Table(box=box.SIMPLE_HEAD, caption=caption, padding=(0, 1), pad_edge=False)
    shown.add_column("model", overflow="fold", min_width=12)
    for name in names:
        n = next(row.benchmarks[name].n for row in results.rows if name in row.benchmarks)
        shown.add_column(f"{name}\n{n} items", justify="right")
    for row in results.rows:
        shown.add_row(Text(row.model, style=STYLES[row.kind]), *(Text(benchmark_text(row, name)) for name in names))
    return shown


def rich_table(results: Results, *, title: str = "") -> Table:
    """The table for the terminal, readable at 120 columns."""
    shown = Table(
        title=title or None,
        box=box.SIMPLE_HEAD,
        caption="\n".join([legend(results), *(f"- {note}" for note in notes(results, short=True))]),
        caption_justify="left",
        padding=(0, 0),
        pad_edge=False,
    )
    shown.add_column("model", overflow="fold", ratio=None, min_width=12)
    shown.add_column("kind", no_wrap=True)
    for column in COLUMNS:
        shown.add_column(_beside(column, column.short, "\n", results), justify="right", no_wrap=True)
    for row in results.rows:
        style = STYLES[row.kind]
        name = Text(row.model, style=style)
        # Text, not markup: a model's name may hold square brackets.
        shown.add_row(name, Text(row.kind, style=style), *(Text(column.text(row)) for column in COLUMNS))
    return shown


def _beside(column: Column, heading: str, space: str, results: Results) -> str:
    """A heading, with the judge's recall beside the rate of refusals of harmful questions."""
    known = recall_note(results) if column is COLUMNS[0] else ""
    return f"{heading}{space}({known.replace(' ', space) if space != ' ' else known})" if known else heading


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def markdown_table(results: Results, models: list[str] | None = None) -> str:
    """The same table in markdown, for a README or a model card.

    Args:
        results: The results.
        models: Names of the rows to show, in this order; None for all.

    Raises:
        InputError: A name has no row.
    """
    rows = list(results.rows) if models is None else [results.row(model) for model in models]
    lines = [
        "| model | kind | " + " | ".join(_beside(column, column.title, " ", results) for column in COLUMNS) + " |",
        "| --- | --- | " + " | ".join("---:" for _ in COLUMNS) + " |",
    ]
    for row in rows:
        name = f"**{_cell(row.model)}**" if row.model == results.headline else _cell(row.model)
        lines.append(f"| {name} | {row.kind} | " + " | ".join(column.text(row) for column in COLUMNS) + " |")
    under = [f"- {_cell(note)}" for note in notes(results)]
    text = "\n".join(lines) + "\n\n" + legend(results) + "\n" + ("\n" + "\n".join(under) + "\n" if under else "")
    names = benchmarks(results)
    if not names:
        return text
    lines = ["| model | " + " | ".join(names) + " |", "| --- | " + " | ".join("---:" for _ in names) + " |"]
    lines += [
        f"| {_cell(row.model)} | " + " | ".join(benchmark_text(row, name) for name in names) + " |" for row in rows
    ]
    caption = BENCHMARK_LEGEND.format(confidence=results.confidence * 100)
    return text + "\n" + "\n".join(lines) + "\n\n" + caption + "\n"
