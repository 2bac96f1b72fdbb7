"""`resafe.evaluate`: one call, one table, figures that follow from the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import resafe
from resafe.errors import InputError
from resafe.evals import rules
from resafe.evals.judge import JUDGES, Judged, Verdict
from resafe.evals.statistics import safety_recovery
from tests.evals.tiny import ragged_prompts, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("aligned", "tuned", "safe")):
        tiny_model(seed).save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    return [(name, place / name) for name in ("aligned", "tuned", "safe")]


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    files = {}
    for name, prompts in (("harm", ragged_prompts(12)[:6]), ("look", ragged_prompts(12)[6:])):
        files[name] = str(tmp_path / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return files


def by_length(items: Sequence[Judged]) -> list[Verdict]:
    """A judge whose verdicts differ between models: an even number of words is a refusal."""
    said = ["refused" if len(item.response.split()) % 2 == 0 else "answered" for item in items]
    return [Verdict(outcome, float(outcome == "refused")) for outcome in said]


def test_one_call_and_its_table(
    models: Any, own: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rules.refusal_rules is JUDGES.get("refusal").function
    monkeypatch.setitem(JUDGES._methods, "refusal", type(JUDGES.get("refusal"))(
        "refusal", "t", "s", lambda: by_length, {"measures": "refusal"}
    ))  # fmt: skip
    table = resafe.evaluate(
        models, safety=[own["harm"]], harmless=[own["look"]], max_new_tokens=7, dtype="float32", device="cpu",
        store=tmp_path / "store",
    )  # fmt: skip
    refused = {
        name: [
            float(v.outcome == "refused")
            for a, v in zip(table.safety.answers, table.safety.verdicts["refusal"], strict=True)
            if (a.model, a.side) == (name, "harmful")
        ]
        for name, _ in models
    }
    assert len({tuple(values) for values in refused.values()}) > 1
    row = table.results.row("safe")
    assert row.kind == "realigned" and table.results.row("tuned").kind == "tuned"
    assert row.harmful_refused.value == sum(refused["safe"]) / 6
    expected = safety_recovery(refused["safe"], refused["tuned"], refused["aligned"])
    assert (row.safety_recovery.value == expected.value) or not expected.defined
    assert row.harmless_refused.n == 6
    assert "aligned" in str(table) and "R_s" in str(table)
    assert table.markdown().startswith("| model | kind |")
    json.dumps(table.to_json(), allow_nan=False)


def test_what_no_judge_scored_counts_for_nobody() -> None:
    """A question that one model has no verdict on is left out for all; the others keep theirs."""
    from resafe.evals.safety.result import Answer, SafetyResult
    from resafe.evals.scoring import Named
    from resafe.evaluation import _records

    answers = tuple(
        Answer(model, "set", "harmful", "none", f"q{n}", f"p{n}", "", "en", "r") for model in "ab" for n in range(3)
    )
    outcomes = ("refused", "refused", "answered", "refused", "unscored", "partial")
    verdicts = tuple(Verdict(one, None) for one in outcomes)
    judge = Named("refusal", "refusal", lambda items: [])
    found = _records(SafetyResult(("a", "b"), answers, (judge,), {"refusal": verdicts}, 1.0))
    assert [(r.model, r.id, r.score) for r in found] == [("a", "q0", 1), ("a", "q2", 0), ("b", "q0", 1), ("b", "q2", 1)]


def test_what_cannot_be_measured(models: Any) -> None:
    with pytest.raises(InputError, match="nothing to measure"):
        resafe.evaluate(models)
    with pytest.raises(InputError, match=r"no setting \['speed'\]"):
        resafe.evaluate(models, safety=["harmful"], speed=3)
    with pytest.raises(InputError, match="on local models only"):
        resafe.evaluate(["openai-api/x/y"], utility=["copa"])


def test_the_table_tells_what_is_known_of_its_judge() -> None:
    """Recall beside the rate, n scored of n asked, and corrected rates where they were asked for."""
    from dataclasses import replace

    from resafe.evals.calibration import stored_calibration
    from resafe.evals.safety.result import Answer, SafetyResult
    from resafe.evals.safety.subjects import Subject
    from resafe.evals.scoring import Named
    from resafe.evals.statistics import corrected_rate, wilson
    from resafe.evaluation import _summary
    from resafe.report import markdown_table

    answers = tuple(
        Answer(model, "set", "harmful", "none", f"q{n}", f"p{n}", "", "en", "r") for model in "ab" for n in range(4)
    )
    outcomes = ("refused", "refused", "answered", "refused", "unscored", "partial", "answered", "answered")
    verdicts = tuple(Verdict(one, None) for one in outcomes)
    named = Named("refusal", "refusal", lambda items: [], stored_calibration("refusal"))
    found = [Subject(name, name) for name in "ab"]
    result = SafetyResult(("a", "b"), answers, (named,), {"refusal": verdicts}, 1.0)
    plain = _summary(found, result, ())
    assert plain.row("a").harmful_refused == wilson(2, 3)  # q0 has no score for b: left out for both
    assert "3 scored / 4 asked harmful" in markdown_table(plain)
    assert "harmful refused (judge's recall 95)" in markdown_table(plain)
    fixed = _summary(found, replace(result, corrected=True), ())
    errors = named.errors
    assert errors is not None and fixed.row("a").harmful_refused == corrected_rate(wilson(2, 3), errors)
    unknown = replace(result, corrected=True, judges=(replace(named, calibration=None),))
    table = _summary(found, unknown, ())
    assert table.row("a").harmful_refused == wilson(2, 3)
    assert "not calibrated here, so its rates cannot be corrected" in markdown_table(table)
