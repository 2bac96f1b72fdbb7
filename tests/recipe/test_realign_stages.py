"""What a recipe hands to its methods, and what their stages depend on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from resafe.recipe import check_recipe, realign_stages
from resafe.recipe.realign_stages import _distils, _problem, _rule
from resafe.recipe.schema import RealignPart
from resafe.recipe.select import ChoiceRule
from tests.conftest import TinyRun


def test_the_rule_for_strengths_is_the_recipes(tiny: TinyRun) -> None:
    raw = {**tiny.raw, "questions": {**tiny.raw["questions"]}}
    assert _rule(cast(Any, SimpleNamespace(recipe=check_recipe(raw, "")))) == ChoiceRule(0.04, 5.0, 0.04)
    own = {"allowed_over_refusal": 0.1, "over_refusal_price": 7}
    raw["questions"]["validation"] = {**raw["questions"].get("validation", {}), **own}
    assert _rule(cast(Any, SimpleNamespace(recipe=check_recipe(raw, "")))) == ChoiceRule(0.1, 7.0, 0.04)


def test_each_task_example_is_handed_on_with_its_tuned_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = {"one": ["a", "b"], "two": ["c"] * 300}
    context: Any = SimpleNamespace(
        open_stage=lambda stage: stage,
        task_pool=lambda tune: pools[tune],
        recipe=SimpleNamespace(tune={name: name for name in pools}, seed=0),
        material=SimpleNamespace(pairs=[]),
        reporter=SimpleNamespace(bar=lambda *names: None),
    )
    monkeypatch.setattr(realign_stages, "task_vectors", lambda tuned, aligned: [(one, aligned) for one in tuned])
    monkeypatch.setattr(realign_stages, "Problem", SimpleNamespace)
    part = RealignPart(method="somf", tuned=["two", "one"])
    stages: Any = {"one": "tuned on one", "two": "tuned on two"}
    made = _problem(context, part, cast(Any, "aligned"), stages, Path("work"))
    assert made.vectors == [("tuned on two", "aligned"), ("tuned on one", "aligned")]
    assert made.keep == ["c"] * 200 + ["a", "b"] and made.keep_of == [0] * 200 + [1, 1]


@pytest.mark.parametrize(
    ("settings", "more", "taught"),
    [
        ({}, {}, True),
        ({"loss": None}, {}, True),
        ({"preset": "labels"}, {}, False),
        ({"preset": "labels", "task_divergence": "5e-1"}, {}, True),
        ({"preset": "paper", "loss": "distill"}, {}, True),
        ({"loss": "sft"}, {}, False),
        ({}, {"mask_of": "other"}, False),
        ({"mask": "somewhere"}, {}, False),
    ],
)
def test_whether_the_tuned_models_teach(settings: dict[str, Any], more: dict[str, str], taught: bool) -> None:
    assert _distils(RealignPart(method="somf", tuned=["one", "two"], settings=settings, **cast(Any, more))) is taught
