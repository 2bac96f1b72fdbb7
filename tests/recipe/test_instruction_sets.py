"""A recipe that tunes on an instruction set: rows without what is evaluated, questions in disjoint parts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from resafe.cli.console import ConsoleReporter
from resafe.data.mixes import normalised
from resafe.errors import InputError
from resafe.recipe.context import Context
from resafe.recipe.load import check_recipe
from resafe.recipe.stage import Run

DATA = Path(os.environ.get("RESAFE_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}; set RESAFE_DATA_DIR")


def context(tmp_path: Path, task: str) -> Context:
    step = {"steps": 1, "learning_rate": 1e-3}
    recipe = check_recipe(
        {
            "name": "math",
            "model": {"reference": "nowhere"},
            "data": {"data_dir": str(DATA)},
            "align": {"sft": step},
            "tune": {"math": {"task": task, "examples": 50, **step}},
            "realign": {"half": {"method": "interpolation", "tuned": ["math"]}},
        },
        "test",
    )
    return Context(recipe, Run(tmp_path / "run", lambda line: None), ConsoleReporter(quiet=True))


def test_gsm8k(tmp_path: Path) -> None:
    made = context(tmp_path, "gsm8k")
    mix = made.mix("math")
    test = made.task_set("math", "test", 100).questions
    validation = made.task_set("math", "validation", 40).questions
    assert (len(mix), len(test), len(validation)) == (50, 100, 40)
    asked = [{normalised(item.prompt) for item in part} for part in (mix, test, validation)]
    assert not asked[0] & asked[1] | asked[0] & asked[2] | asked[1] & asked[2]
    assert all(question.target and question.target.lstrip("-").isdigit() for question in test)
    assert mix[0].response.rsplit("The answer is ", 1)[1].endswith(".")


def test_sets_without_questions_are_refused(tmp_path: Path) -> None:
    made = context(tmp_path, "alpaca_gpt4_zh")
    assert len(made.mix("math")) == 50
    with pytest.raises(InputError, match="holds no questions"):
        made.task_set("math", "test", 10)
    with pytest.raises(InputError, match="no training data 'gsm9k'"):
        context(tmp_path, "gsm9k").mix("math")
