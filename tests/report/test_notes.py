"""What stands under the table: the judge's recall, what the size can show, nothing in n, who differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scipy.stats import binomtest

from resafe.errors import InputError
from resafe.evals.calibration import stored_calibration, to_json
from resafe.report import ModelInfo, from_json, markdown_table, summarise
from resafe.report import to_json as results_json
from resafe.report.notes import corrected, notes, recall_note
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
    with pytest.raises(InputError, match="hold no calibration"):
        corrected(replace(results, calibration={}))
