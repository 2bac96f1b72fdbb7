"""The terminal and markdown tables, the workbook and the model card, read back."""

from __future__ import annotations

import dataclasses
import importlib
import io
from pathlib import Path

import openpyxl
import pytest
import yaml
from rich.console import Console

from resafe.errors import InputError, ResafeError
from resafe.evals.statistics import Interval, wilson
from resafe.report import markdown_table, model_card, rich_table, write_page, write_workbook
from resafe.report.numbers import decimal, duration, limits, percent, share
from resafe.report.workbook import CELL_LIMIT, clean

NAN = float("nan")


def test_numbers() -> None:
    assert [percent(v) for v in (0.874, 0.005, -0.04, -0.001, 1.125, NAN)] == ["87", "1", "−4", "0", "113", "–"]
    assert [percent(v, signed=True) for v in (0.02, 0.0, -0.02)] == ["+2", "0", "−2"]
    assert share(Interval(0.87, 0.81, 0.91, 100)) == "87 [81–91]"
    assert share(Interval(0.01, -0.02, 0.04, 100), signed=True) == "+1 [−2, +4]"
    assert share(Interval.undefined("why")) == "–" and limits(Interval.undefined("why")) == ""
    assert share(Interval(1.0, 1.0, 1.0, 9)) == "100"
    assert (decimal(5.66), decimal(NAN)) == ("5.7", "–")
    assert [duration(s) for s in (48.4, 725, 7380, NAN)] == ["48 s", "12 min 5 s", "2 h 3 min", "–"]


def test_terminal_table_fits_120_columns(fake) -> None:  # type: ignore[no-untyped-def]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(rich_table(fake.results, title="demo"))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 120
    row = next(line for line in lines if line.lstrip().startswith("gradient selector"))
    selector = fake.results.row("gradient selector")
    for text in (share(selector.harmful_refused), share(selector.safety_recovery), "5.9", "realigned"):
        assert text in row
    assert "…" not in "".join(lines)
    # Brackets in a name are text, not markup.
    odd = dataclasses.replace(fake.results, rows=(dataclasses.replace(selector, model="[red]x[/red]"),))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(rich_table(odd))
    assert "[red]x[/red]" in console.export_text().replace("\n", "")


def test_markdown_table(fake) -> None:  # type: ignore[no-untyped-def]
    lines = markdown_table(fake.results).splitlines()
    # heads, ten models, the legend, and two notes: what is detectable and who differs from the headline
    assert len(lines) == 2 + 10 + 2 + 3 and all(line.count("|") == 11 for line in lines[:12])
    assert lines[4].startswith("| **gradient selector** | realigned | ")
    odd = dataclasses.replace(fake.results.rows[0], model="a|b <i>")
    only = markdown_table(dataclasses.replace(fake.results, rows=(odd,)), ["a|b <i>"]).splitlines()
    assert only[2].startswith("| a\\|b &lt;i> | aligned |")


class TestWorkbook:
    EVIL = ("=1+1", "+1", "-1", "@SUM(A1)", '=HYPERLINK("x","y")')

    @pytest.fixture
    def book(self, fake, tmp_path: Path) -> openpyxl.Workbook:  # type: ignore[no-untyped-def]
        records = [dataclasses.replace(r, response=text) for r, text in zip(fake.records, self.EVIL, strict=False)]
        records.append(dataclasses.replace(fake.records[5], response="bell\x07 null\x00 \ud800\uffff tab\t end"))
        records.append(dataclasses.replace(fake.records[6], model="DARE"))
        write_workbook(tmp_path / "results.xlsx", fake.results, records)
        return openpyxl.load_workbook(tmp_path / "results.xlsx")

    def test_summary(self, book: openpyxl.Workbook, fake) -> None:  # type: ignore[no-untyped-def]
        assert book.sheetnames == ["Summary", "Topics", "Responses", "Records"]
        sheet = book["Summary"]
        assert sheet.freeze_panes == "B2"
        header = [cell.value for cell in sheet[1]]
        column = header.index("safety recovery R_s") + 1
        found = [sheet.cell(4, column + i) for i in range(3)]
        expected = fake.results.row("gradient selector").safety_recovery
        assert [cell.value for cell in found] == pytest.approx([expected.value, expected.low, expected.high])
        assert all(cell.number_format == "0.0%" for cell in found)
        assert sheet.cell(4, 1).value == "gradient selector" and sheet.cell(4, 5).value == 5.9
        assert header.index("task: arithmetic") > 0

    def test_topics(self, fake, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        records = [r for r in fake.records if r.model == "aligned" and r.side == "harmful"]
        write_workbook(tmp_path / "results.xlsx", fake.results, records)
        rows = list(openpyxl.load_workbook(tmp_path / "results.xlsx")["Topics"].iter_rows(values_only=True))
        assert rows[0] == ("side", "topic", "model", "n asked", "n scored", "refused", "low", "high")
        mine = [r for r in records if r.topic == "child_safety"]
        expected = wilson(sum(r.outcome == "refused" for r in mine), 11)
        found = next(row for row in rows if row[:3] == ("harmful", "child safety", "aligned"))
        assert found[3:5] == (11, 11)
        assert found[5:] == pytest.approx((expected.value, expected.low, expected.high))

    def test_formulas_are_text(self, book: openpyxl.Workbook) -> None:
        sheet = book["Records"]
        names = [cell.value for cell in sheet[1]]
        cells = [sheet.cell(i, names.index("response") + 1) for i in range(2, 8)]
        assert [cell.value for cell in cells[:5]] == list(self.EVIL)
        assert all(cell.data_type == "s" and cell.quotePrefix for cell in cells[:5])
        assert cells[5].value == "bell null  tab\t end"
        assert not any(cell.data_type == "f" for s in book for line in s.iter_rows() for cell in line)

    def test_one_row_a_question(self, book: openpyxl.Workbook, fake) -> None:  # type: ignore[no-untyped-def]
        sheet = book["Responses"]
        header = [cell.value for cell in sheet[1]]
        assert header[:5] == ["set", "id", "topic", "question", "target"] and header[5] == "aligned"
        assert sheet.max_row == 1 + 7
        assert sheet.cell(8, header.index("DARE") + 1).value.endswith(fake.records[6].response)
        assert sheet.cell(8, header.index("aligned") + 1).value is None

    def test_long_text_is_cut_with_a_mark(self) -> None:
        assert len(clean("x" * 40_000)) == CELL_LIMIT and clean("x" * 40_000).endswith("[cut]")
        assert clean("x" * CELL_LIMIT) == "x" * CELL_LIMIT


class TestCard:
    def test_front_matter_and_table(self, fake) -> None:  # type: ignore[no-untyped-def]
        text = model_card(
            fake.results,
            "SOMF, default preset",
            base_model=["org/a: b", "org/c"],
            license="apache-2.0",
            recipe="seed: 0\n# ```\n",
            tags=["x"],
        )
        _, front, body = text.split("---\n", 2)
        values = yaml.safe_load(front)
        assert values["base_model"] == ["org/a: b", "org/c"] and values["license"] == "apache-2.0"
        assert values["library_name"] == "transformers" and "arxiv:2405.09055" in values["tags"]
        assert "datasets" not in values
        row = fake.results.row("SOMF, default preset")
        assert f"{share(row.harmful_refused)} % of 160 harmful questions" in body
        shown = [line.split("|")[1].strip() for line in body.splitlines() if line.startswith("| ")]
        assert shown == ["model", "---", "aligned", "tuned-arithmetic", "SOMF, default preset"]
        assert "````yaml\nseed: 0" in body and "- granularity: `entry`" in body
        assert "not a guarantee" in body and "rules on the first sentences of a response" in body
        assert f"- recipe: `sha256:{'ab' * 32}`" in body

    def test_a_sparse_row(self, fake) -> None:  # type: ignore[no-untyped-def]
        row = dataclasses.replace(
            fake.results.rows[2],
            utility=Interval.undefined("none"),
            perplexity=NAN,
            aligned="",
            tuned="",
            method="",
            note="A note.",
        )
        results = dataclasses.replace(fake.results, rows=(row,), versions={}, judge="")
        text = model_card(results, row.model, digests={})
        assert "perplexity –" not in text.lower() and "Not named." in text and "A note." in text
        assert "Made from" not in text and "base_model" not in text
        with pytest.raises(InputError):
            model_card(fake.results, "gone")


@pytest.mark.parametrize(("library", "write"), [("openpyxl", write_workbook), ("jinja2", write_page)])
def test_missing_library_has_a_remedy(library, write, fake, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    real = importlib.import_module

    def without(name: str) -> object:
        if name == library:
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ResafeError, match=library) as caught:
        write(tmp_path / "x", fake.results, fake.records)
    assert "resafe[report]" in caught.value.hint and not list(tmp_path.iterdir())
