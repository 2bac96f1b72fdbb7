"""The results as a table for the terminal (rich) and for markdown. Knows no files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from resafe.report.notes import notes, recall_note
from resafe.report.numbers import decimal, share
from resafe.report.results import Results, Row

STYLES = {"aligned": "blue", "tuned": "red", "realigned": "bold green", "baseline": "default"}
LEGEND = (
    "Shares in % with {confidence:.0f} % intervals, on {harmful} harmful, {harmless} harmless and {task} task items. "
    "R_s: safety recovered, R_u: utility retained; added: harmless questions refused, in points over the tuned model."
)


@dataclass(frozen=True)
class Column:
    """A column of figures: its heading, its heading in two lines for narrow tables, and its text for a row."""

    title: str
    short: str
    text: Callable[[Row], str]


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


def legend(results: Results) -> str:
    """One line that says what the table's figures are."""
    counts = {side: results.items.get(side, 0) for side in ("harmful", "harmless", "task")}
    return LEGEND.format(confidence=results.confidence * 100, **counts)


def rich_table(results: Results, *, title: str = "") -> Table:
    """The table for the terminal, readable at 120 columns."""
    shown = Table(
        title=title or None,
        box=box.SIMPLE_HEAD,
        caption="\n".join([legend(results), *notes(results)]),
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
    return "\n".join([*lines, "", legend(results), *(["", *under] if under else [])]) + "\n"
