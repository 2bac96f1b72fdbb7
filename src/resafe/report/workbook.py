"""`results.xlsx`: the summary, the responses side by side, and every record.

Everything a model wrote is stored as text: a response that begins with `=`, `+`, `-` or `@` is never a formula, and
characters that XML cannot hold are left out.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError
from resafe.evals.records import Record
from resafe.evals.statistics import Interval
from resafe.files import replacing
from resafe.report.notes import notes, recall_note
from resafe.report.overview import heat
from resafe.report.results import Results, Row
from resafe.report.rogan_gladen import Correction
from resafe.report.table import benchmarks, legend

CELL_LIMIT = 32_767
"""Characters that a cell can hold."""
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_FORMULA = ("=", "+", "-", "@")
_CUT = " … [cut]"
_RATES: tuple[tuple[str, Callable[[Row], Interval]], ...] = (
    ("harmful refused", lambda row: row.harmful_refused),
    ("harmful answered", lambda row: row.harmful_answered),
    ("harmful broken", lambda row: row.harmful_broken),
    ("harmless refused", lambda row: row.harmless_refused),
    ("look-alike refused", lambda row: row.look_alike_refused),
    ("plain refused", lambda row: row.plain_refused),
    ("task score", lambda row: row.utility),
    ("safety recovery R_s", lambda row: row.safety_recovery),
    ("utility retention R_u", lambda row: row.utility_retention),
    ("over-refusal added to tuned", lambda row: row.over_refusal_added),
    ("over-refusal against aligned", lambda row: row.over_refusal_vs_aligned),
)
_FILLS = {"base": "EADCF4", "aligned": "DCE6F7", "tuned": "F9DEDC", "realigned": "D9EFDF", "baseline": "F2F2F2"}


def clean(text: str) -> str:
    """Text that a cell can hold: without characters illegal in XML, cut at the cell's limit with a mark."""
    text = _ILLEGAL.sub("", text)
    return text if len(text) <= CELL_LIMIT else text[: CELL_LIMIT - len(_CUT)] + _CUT


class _Writer:
    """Appends styled rows to one sheet; holds the library so that importing this module does not need it."""

    def __init__(self, book: Any, title: str) -> None:
        self.sheet = book.create_sheet(title)
        self.styles = importlib.import_module("openpyxl.styles")
        self.wrapped = self.styles.Alignment(vertical="top", wrap_text=True)
        self.row = 0

    def put(self, column: int, value: Any, number_format: str = "", wrap: bool = False) -> Any:
        cell = self.sheet.cell(row=self.row, column=column)
        if isinstance(value, str):
            cell.value = clean(value)
            cell.data_type = "s"
            if value.startswith(_FORMULA):
                # As if typed with a leading apostrophe, so that editing the cell keeps it text.
                cell.quotePrefix = True
        elif not (isinstance(value, float) and not math.isfinite(value)):
            cell.value = value
        if number_format:
            cell.number_format = number_format
        if wrap:
            cell.alignment = self.wrapped
        return cell

    def header(self, titles: Sequence[str], widths: Sequence[float], frozen_columns: int) -> None:
        self.row += 1
        for column, title in enumerate(titles, 1):
            cell = self.put(column, title)
            cell.font = self.styles.Font(bold=True, color="FFFFFF")
            cell.fill = self.styles.PatternFill("solid", start_color="1F3A4D")
            cell.alignment = self.styles.Alignment(vertical="center", wrap_text=True)
            letter = cell.column_letter
            self.sheet.column_dimensions[letter].width = widths[min(column, len(widths)) - 1]
        self.sheet.row_dimensions[self.row].height = 34
        first_free = self.sheet.cell(row=self.row + 1, column=frozen_columns + 1)
        self.sheet.freeze_panes = first_free.coordinate

    def filter(self) -> None:
        self.sheet.auto_filter.ref = self.sheet.dimensions


def write_workbook(
    path: Path,
    results: Results,
    records: Sequence[Record],
    shown: Sequence[Record] | None = None,
    correction: Correction | None = None,
) -> None:
    """Write the workbook: Summary, Topics, Responses and Records, and Seeds for a table over several.

    Args:
        path: The file.
        results: The rows.
        records: All items.
        shown: The items whose answers stand side by side; None for all.
        correction: Rates corrected for the judge's errors, to stand in the summary too; None to leave them out.

    Raises:
        ResafeError: openpyxl is not installed.
    """
    try:
        library = importlib.import_module("openpyxl")
    except ImportError as error:
        raise ResafeError("the workbook needs openpyxl", "pip install 'resafe[report]'") from error
    book = library.Workbook()
    book.remove(book.active)
    _summary(_Writer(book, "Summary"), results, correction)
    if results.training_seeds:
        _seeds(_Writer(book, "Seeds"), results)
    side_by_side = records if shown is None else shown
    _topics(_Writer(book, "Topics"), results, side_by_side)
    _responses(_Writer(book, "Responses"), results, side_by_side)
    _records(_Writer(book, "Records"), records)
    with replacing(path) as beside:
        book.save(beside)


def _summary(writer: _Writer, results: Results, correction: Correction | None) -> None:
    tasks = list(dict.fromkeys(task for row in results.rows for task in row.utility_by_task))
    titles = ["model", "kind", "method", "settings", "perplexity"]
    measured = benchmarks(results)
    fixed = correction.titles if correction else []
    known = recall_note(results)
    headings = [f"{title} ({known})" if known and title == _RATES[0][0] else title for title, _ in _RATES]
    headings += [f"{title}, corrected" for title in fixed] + [f"task: {task}" for task in tasks]
    for title in headings + [part for name in measured for part in (name, f"{name}: change against aligned")]:
        titles += [title, "low", "high"]
    writer.header([*titles, "note"], [30, 11, 24, 24, *[11] * (len(titles) - 4), 50], frozen_columns=1)
    for row in results.rows:
        writer.row += 1
        settings = ", ".join(f"{key} {value}" for key, value in row.settings.items())
        for column, text in enumerate((row.model, row.kind, row.method, settings), 1):
            cell = writer.put(column, text)
            if column <= 2:
                cell.fill = writer.styles.PatternFill("solid", start_color=_FILLS[row.kind])
                cell.font = writer.styles.Font(bold=row.model == results.headline)
        writer.put(5, row.perplexity, "0.00")
        shown: list[Interval | None] = [rate(row) for _, rate in _RATES]
        shown += [correction.rates[row.model][title] for title in fixed] if correction else []
        shown += [row.utility_by_task.get(task) for task in tasks]
        shown += [part.get(name) for name in measured for part in (row.benchmarks, row.benchmark_changes)]
        column = 6
        for interval in shown:
            for part in ("value", "low", "high"):
                cell = writer.put(column, math.nan if interval is None else getattr(interval, part), "0.0%")
                if part != "value":
                    cell.font = writer.styles.Font(color="808080")
                column += 1
        reasons = [row.note] + [f"{title}: {rate(row).reason}" for title, rate in _RATES if rate(row).reason]
        writer.put(column, "; ".join(reason for reason in reasons if reason))
    writer.filter()
    for text in (legend(results), *notes(results), results.judge, correction.note if correction else ""):
        writer.row += 2 if text else 0
        if text:
            writer.put(1, text)


def _seeds(writer: _Writer, results: Results) -> None:
    writer.header(
        ["model", "figure", *(f"seed {seed}" for seed in results.training_seeds)], [30, 24, 12], frozen_columns=2
    )
    for row in results.rows:
        for name, values in row.by_seed.items():
            writer.row += 1
            writer.put(1, row.model)
            writer.put(2, name.replace("_", " "))
            for column, value in enumerate(values, 3):
                writer.put(column, value, "0.00" if name == "perplexity" else "0.0%")
    writer.filter()


def _topics(writer: _Writer, results: Results, records: Sequence[Record]) -> None:
    """Refusals by topic: one row a side, topic and model, with the Wilson interval."""
    titles = ["side", "topic", "model", "n asked", "n scored", "refused", "low", "high"]
    writer.header(titles, [12, 28, 30, 11], frozen_columns=3)
    for table in heat(results, records):
        for topic, cells in table.topics:
            for row, cell in zip(results.rows, cells, strict=True):
                if cell is None:
                    continue
                writer.row += 1
                found = cell.refused
                for column, value in enumerate((table.side, topic, row.model, cell.asked, found.n), 1):
                    writer.put(column, value)
                for column, share in enumerate((found.value, found.low, found.high), 6):
                    writer.put(column, share, "0.0%")
    writer.filter()


def _responses(writer: _Writer, results: Results, records: Sequence[Record]) -> None:
    models = [row.model for row in results.rows]
    writer.header(["set", "id", "topic", "question", "target", *models], [12, 10, 16, 45, 14, 45], frozen_columns=4)
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        rows.setdefault((record.set, record.id), {})[record.model] = record
    for (name, item), found in rows.items():
        writer.row += 1
        first = next(iter(found.values()))
        for column, text in enumerate((name, item, first.topic, first.prompt, first.target or ""), 1):
            writer.put(column, text, wrap=column == 4)
        for column, model in enumerate(models, 6):
            if model in found:
                writer.put(column, f"[{found[model].outcome}] {found[model].response}", wrap=True)
    writer.filter()


def _records(writer: _Writer, records: Sequence[Record]) -> None:
    names = [item.name for item in fields(Record)]
    widths = {"prompt": 45.0, "response": 60.0, "model": 26.0, "score": 8.0}
    writer.header(names, [widths.get(name, 14.0) for name in names], frozen_columns=1)
    for record in records:
        writer.row += 1
        for column, name in enumerate(names, 1):
            value = getattr(record, name)
            writer.put(column, value if value is None or isinstance(value, int | float) else str(value))
    writer.filter()
