"""What stands under the table: the judge's recall, what the size can show, nothing in n, who differs."""

from __future__ import annotations

from dataclasses import replace

import openpyxl
import pytest
from scipy.stats import binomtest

from resafe.errors import InputError
from resafe.evals.calibration import stored_calibration, to_json
from resafe.evals.statistics import corrected_rate
from resafe.report import ModelInfo, from_json, markdown_table, render_page, summarise, write_workbook
from resafe.report import to_json as results_json
from resafe.report.notes import notes, recall_note
from resafe.report.rogan_gladen import BESIDE, corrected, correction
from resafe.report.table import legend
from tests.report.test_results import side


@pytest.fixture
def results(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("RESAFE_CACHE", str(tmp_path))
    records = side("aligned", "harmful", 90, 100) + side("aligned", "harmless", 4, 50)
    records += side("tuned", "harmful", 10, 100) + side("tuned", "harmless", 0, 50)
    records += side("safe", "harmful", 70, 100) + side("safe", "harmless", 3, 50)
    kinds = {
        "aligned": ModelInfo("aligned", "aligned", tuned="tuned"),
        "tuned": ModelInfo("tuned", "tuned", aligned="aligned"),
        "safe": ModelInfo("safe", "realigned", aligned="aligned", tuned="tuned"),
    }
    known = stored_calibration("refusal")
    assert known is not None
    return summarise(records, kinds, {}, replicates=100, calibration=to_json(known))


def test_lines(results) -> None:  # type: ignore[no-untyped-def]
    recall, detectable, nothing, compared = notes(results)
    assert recall.startswith("The judge refusal against people on xstest (1125 responses): recall 95 [93–96] %")
    assert "points on 100 harmful items" in detectable and "on 50 harmless items" in detectable
    assert nothing == "Never refuses harmless questions: 0 of 50, so at most 6.0 % (3/n) – tuned."
    # 60 questions that only "safe" refuses, none the other way; 3 harmless ones; Holm doubles the smaller p.
    p = 2 * binomtest(60, 60).pvalue
    assert f"tuned: harmful {p:.2g}, harmless 0.25" in compared
    assert recall_note(results) == "judge's recall 95"
    assert "harmful refused (judge's recall 95)" in markdown_table(results)


def test_several_training_seeds_ask_no_more_questions(results) -> None:  # type: ignore[no-untyped-def]
    rows = tuple(replace(row, harmless_refused=replace(row.harmless_refused, n=150)) for row in results.rows)
    pooled = replace(results, rows=rows, training_seeds=(0, 1, 2))
    _, detectable, nothing, _ = notes(pooled)
    assert "on 50 harmless items" in detectable and "0 of 50, so at most 6.0 %" in nothing
    with pytest.raises(InputError, match="several training seeds"):
        corrected(pooled)


def test_through_json_and_from_older_files(results) -> None:  # type: ignore[no-untyped-def]
    document = results_json(results)
    assert from_json(document) == results
    older = {key: value for key, value in document.items() if key not in ("calibration", "comparisons")}
    assert notes(from_json(older)) == notes(replace(results, calibration={}, comparisons=()))


def test_corrected(results) -> None:  # type: ignore[no-untyped-def]
    errors = stored_calibration("refusal").best.overall.errors  # type: ignore[union-attr]
    fixed = corrected(results)
    gained = errors.recall + errors.specificity - 1
    values = [fixed.row(name).harmful_refused.value for name in ("aligned", "tuned", "safe")]
    assert values[2] == pytest.approx((0.7 + errors.specificity - 1) / gained)
    # A ratio of differences is what it was.
    assert (values[2] - values[1]) / (values[0] - values[1]) == pytest.approx(results.row("safe").safety_recovery.value)
    # It says so, and says nothing of n that holds for measured rates only.
    said = notes(fixed)
    assert said[0].startswith("Rates of refusal are corrected") and "0 of 50" not in " ".join(said)
    assert said[0] in markdown_table(fixed) and from_json(results_json(fixed)) == fixed
    with pytest.raises(InputError, match="hold no calibration"):
        corrected(replace(results, calibration={}))


def test_beside_the_measured_rates(results, tmp_path) -> None:  # type: ignore[no-untyped-def]
    errors = stored_calibration("refusal").best.overall.errors  # type: ignore[union-attr]
    found = correction(results)
    assert found.note == BESIDE and found.titles == ["harmful refused", "harmless refused"]
    safe = found.rates["safe"]["harmful refused"]
    assert safe == corrected_rate(results.row("safe").harmful_refused, errors)
    # Wider than Wilson's limits: the labelled rows count too.
    measured = results.row("safe").harmful_refused
    assert safe.high - safe.low > (measured.high - measured.low) / (errors.recall + errors.specificity - 1)

    page = render_page(results, [], correction=found)
    heads = '<button type="button">harmful refused (judge&#39;s recall 95)</button></th><th scope="col">'
    assert 'id="corrected"' in page and heads + '<button type="button">corrected</button>' in page
    assert f'data-v="{safe.value}"' in page and 'id="corrected"' not in render_page(results, [])

    write_workbook(tmp_path / "results.xlsx", results, [], correction=found)
    sheet = openpyxl.load_workbook(tmp_path / "results.xlsx")["Summary"]
    header = [cell.value for cell in sheet[1]]
    assert "harmful refused (judge's recall 95)" in header
    place = header.index("harmful refused, corrected") + 1
    assert sheet.cell(4, 1).value == "safe"
    values = [sheet.cell(4, place + part).value for part in range(3)]
    assert values == pytest.approx([safe.value, safe.low, safe.high])
    assert any(cell.value == BESIDE for cell in sheet["A"])


def test_a_judge_that_was_never_calibrated_gets_a_note_and_no_number(results, tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = correction(replace(results, calibration={}))
    assert found.titles == [] and found.note.startswith("Rates cannot be corrected: the results hold no calibration")
    page = render_page(replace(results, calibration={}), [], correction=found)
    assert "the results hold no calibration" in page and ">corrected<" not in page
    write_workbook(tmp_path / "results.xlsx", results, [], correction=found)
    sheet = openpyxl.load_workbook(tmp_path / "results.xlsx")["Summary"]
    assert not any("corrected" in str(cell.value) for cell in sheet[1])
    assert any(cell.value == found.note for cell in sheet["A"])


def test_what_was_asked_and_not_scored_is_said(results) -> None:  # type: ignore[no-untyped-def]
    fewer = replace(results, asked={"harmful": 103, "harmless": 50})
    assert "on 100 scored / 103 asked harmful, 50 harmless" in legend(fewer)
    assert from_json(results_json(fewer)) == fewer
