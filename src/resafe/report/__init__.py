"""Results of an evaluation: rows with intervals, and their table, page, workbook and model card."""

from resafe.report.card import model_card
from resafe.report.page import render_page, write_page
from resafe.report.plot import Point
from resafe.report.results import SCHEMA_VERSION, ModelInfo, Results, Row, summarise
from resafe.report.rogan_gladen import Correction, corrected, correction
from resafe.report.seeds import summarise_seeds
from resafe.report.storage import (
    from_json,
    read_records,
    read_results,
    to_json,
    write_records,
    write_results,
)
from resafe.report.table import benchmark_table, markdown_table, rich_table
from resafe.report.workbook import write_workbook

__all__ = [
    "SCHEMA_VERSION",
    "Correction",
    "ModelInfo",
    "Point",
    "Results",
    "Row",
    "benchmark_table",
    "corrected",
    "correction",
    "from_json",
    "markdown_table",
    "model_card",
    "read_records",
    "read_results",
    "render_page",
    "rich_table",
    "summarise",
    "summarise_seeds",
    "to_json",
    "write_page",
    "write_records",
    "write_results",
    "write_workbook",
]
