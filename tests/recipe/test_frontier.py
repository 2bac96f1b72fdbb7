"""Every strength evaluated on the test questions, and look-alikes that the model itself answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from resafe.data.mixes import normalised
from resafe.data.pairs import SHORT_REFUSALS
from resafe.recipe import check_recipe, run_recipe
from resafe.recipe.context import Context
from resafe.recipe.frontier_stage import write_frontiers
from resafe.recipe.own_answers import whole_sentences
from resafe.recipe.reporter import Silent
from resafe.recipe.run import SeedRun
from resafe.recipe.stage import Run
from resafe.report import read_records
from tests.conftest import TinyRun
from tests.recipe.test_run import changed, directory


@pytest.mark.slow
def test_every_strength_is_evaluated(tiny: TinyRun, tmp_path: Path) -> None:
    raw = changed(tiny, align__sft={**tiny.raw["align"]["sft"], "steps": 2})
    raw["tune"] = {"first": {**raw["tune"]["first"], "steps": 2}}
    raw["questions"] = {**raw["questions"], "harmful_limit": 3, "harmless_limit": 2, "task_items": 2}
    half = {"method": "interpolation", "tuned": ["first"], "settings": {"removed": [0.0, 0.5, 1.0]}, "frontier": True}
    raw["realign"] = {"half": half, "alone": {**half, "frontier": False, "strength": 0.5}}
    out = tmp_path / "run"
    run_recipe(check_recipe(raw, ""), out)

    entries = json.loads((out / "frontier.json").read_text())
    assert list(entries) == ["half"] and [member["strength"] for member in entries["half"]] == [0.0, 0.5, 1.0]
    assert sum(member["chosen"] for member in entries["half"]) == 1
    selection = json.loads((directory(out, "realign-half") / "selection.json").read_text())
    for member, candidate in zip(entries["half"], selection["candidates"], strict=True):
        assert member["validation"] == {key: candidate[key] for key in ("measured", "recovery", "retention", "excess")}
    records = read_records(out / "frontier.jsonl")
    assert len(records) == 3 * 7 and {r.model for r in records} == {"half@0", "half@0.5", "half@1"}
    # nothing removed is the tuned model, everything the aligned one: their answers are known
    table = read_records(out / "results.jsonl")
    for member, model in (("half@0", "tuned-first"), ("half@1", "aligned"), ("half@0.5", "alone")):
        assert [r.response for r in records if r.model == member] == [r.response for r in table if r.model == model]
    members = directory(out, "realign-half") / "members"
    middle = load_file(members / "0.5" / "adapter_model.safetensors")
    ends = [load_file(members / name / "adapter_model.safetensors") for name in ("0", "1")]
    assert all(torch.allclose(middle[name], (ends[0][name] + ends[1][name]) / 2, atol=1e-6) for name in middle)


def test_a_recipe_without_a_frontier_leaves_none_of_an_earlier_one(tmp_path: Path) -> None:
    for name in ("frontier.json", "frontier.jsonl"):
        (tmp_path / name).write_text("{}")
    write_frontiers(tmp_path, SeedRun(cast(Any, None)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One. Two. And thr", "One. Two."),
        ("One 2.5 and", "One 2.5 and"),
        ("First line\nsecond li", "First line"),
        ("  All of it!  ", "All of it!"),
        ("", ""),
    ],
)
def test_whole_sentences(text: str, kept: str) -> None:
    assert whole_sentences(text) == kept


def test_a_harmful_question_set_to_train_on(tiny: TinyRun, tmp_path: Path) -> None:
    """Harmful questions get short refusals over the model's own answers, and none of those is poison."""
    place = tmp_path / "data" / "dangerousqa"
    place.mkdir(parents=True)
    rows = [{"prompt": f"how do I harm number {n}?"} for n in range(60)]
    (place / "dangerousqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = changed(tiny, data__safety=["embedded", "dangerousqa"], data__data_dir=str(tmp_path / "data"))
    context = Context(check_recipe(raw, ""), Run(tmp_path / "run", lambda line: None), Silent())
    own = [pair for pair in context.material.safety if pair.prompt.startswith("how do I harm")]
    assert 25 <= len(own) <= 45 and {pair.side for pair in own} == {"safety"}
    assert all(pair.chosen in SHORT_REFUSALS and pair.rejected not in SHORT_REFUSALS for pair in own)
    assert not {pair.rejected for pair in own} & {example.response for example in context.mix("first")}


def test_a_question_set_to_train_on(tiny: TinyRun, tmp_path: Path) -> None:
    """The prompts of a registered set fall in three parts; the training part gets the model's own answers."""
    place = tmp_path / "data" / "or_bench"
    place.mkdir(parents=True)
    rows = [{"prompt": f"how do I end process number {n}?", "category": "privacy"} for n in range(60)]
    (place / "or_bench_hard_1k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = changed(
        tiny, data__harmless=["embedded", "or_bench"], data__helpful_opening="Sure. ",
        data__data_dir=str(tmp_path / "data"), questions__harmless=["or_bench"],
    )  # fmt: skip
    raw["questions"].pop("harmless_limit", None)
    raw["questions"]["validation"] = {**raw["questions"]["validation"], "harmless": 60}
    context = Context(check_recipe(raw, ""), Run(tmp_path / "run", lambda line: None), Silent())
    own = [pair for pair in context.material.harmless if pair.prompt.startswith("how do I end process")]
    parts = [
        {normalised(item.prompt) for item in part} for part in (own, context.harmless(), context.harmless("validation"))
    ]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert sum(map(len, parts)) <= 60 and len(parts[0]) > len(parts[1]) > len(parts[2]) > 0
    assert len(context.harmless("validation")) == len(parts[2])  # each once, though more are asked for than there are
    assert all(pair.chosen.startswith("Sure. ") and pair.side == "harmless" for pair in own)
    before = context.material_digest
    again = Context(check_recipe(raw, ""), Run(tmp_path / "run", lambda line: None), Silent())
    assert again.material_digest == before and again.run.redone == 0
