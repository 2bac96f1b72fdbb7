"""The recipes of the five tasks: valid at every scale, published settings; lm-eval's tasks in a tiny recipe."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from resafe.errors import InputError
from resafe.recipe import check_recipe, load_recipe, run_recipe
from resafe.recipe.context import Context
from resafe.recipe.realign_stages import check_methods
from resafe.recipe.reporter import Silent
from resafe.recipe.stage import Run
from resafe.report import read_records, read_results
from resafe.training.presets import preset
from tests.recipe.tiny import save_chat_model, tiny_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "tasks"
SETS = {
    "english": "alpaca_gpt4_en", "chinese": "alpaca_gpt4_zh", "hindi": "alpaca_hindi", "code": "codealpaca",
    "math": "gsm8k",
}  # fmt: skip


@pytest.mark.parametrize("task", SETS)
@pytest.mark.parametrize(("kind", "name"), [("lora", "wizardlm-7b"), ("full", "tinyllama-full")])
def test_the_task_recipes_have_the_published_settings(task: str, kind: str, name: str) -> None:
    recipe = load_recipe(FOLDER / f"{task}-{kind}.yaml")
    check_methods(recipe)
    published = preset(name)
    assert recipe.name == f"{task}-{kind}"
    assert recipe.each_seed == (0, 1, 2)
    assert recipe.full == (published.lora is None) == (kind == "full")
    if published.lora is not None and recipe.align.lora is not None:
        assert (recipe.align.lora.rank, tuple(recipe.align.lora.targets)) == (256, published.lora.targets)
    assert recipe.align.dpo is not None
    tune = recipe.tune[task]
    assert (tune.task, tune.examples) == (SETS[task], None)
    for part, wanted in (
        (recipe.align.sft, published.sft), (recipe.align.dpo, published.dpo), (tune, published.tune_for(SETS[task]))
    ):  # fmt: skip
        assert {key: getattr(part, key) for key in wanted} == wanted


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*-*.yaml")), ids=lambda path: path.stem)
def test_the_smoke_scale_is_small(path: Path) -> None:
    recipe = load_recipe(path, ["seed=5"], "smoke")
    check_methods(recipe)
    assert "SmolLM2-135M" in recipe.model.reference
    assert (recipe.align.dpo, recipe.align.sft.epochs, recipe.seed, recipe.scale) == (None, None, 5, {})
    assert all(part.steps is not None and part.steps <= 4 for part in recipe.tune.values())
    with pytest.raises(InputError, match="no scale 'smok'"):
        load_recipe(path, (), "smok")


def test_a_mistake_in_a_scale_is_found_without_using_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**tiny_recipe(Path("m")), "scale": {"smoke": {"tune": {"first": {"stpes": 1}}}}}))
    with pytest.raises(InputError, match=r"scale smoke.*\n.*tune.first.stpes: unknown field"):
        load_recipe(path)


# Rows of our own, in Chinese and Hindi, in the Hub's columns.
CHINESE = ["他打开了水龙头", "女孩在麦片里发现了一只虫子", "这个人写字写错了", "天黑了"]
HINDI = ["वह घर आया", "पानी गरम है", "उसने कुछ नहीं कहा", "बच्चे खेल रहे हैं"]


def data(folder: Path) -> Path:
    rows = [  # lm-eval takes the full stop off
        {"premise": text + "。", "choice1": "水流出来了", "choice2": "什么都没发生", "question": "effect",
         "label": n % 2, "idx": n, "changed": False}
        for n, text in enumerate(CHINESE)
    ]  # fmt: skip
    labels = ("entailment", "neutral", "contradiction")
    more = [{"premise": text, "hypothesis": "सब ठीक है", "label": labels[n % 3]} for n, text in enumerate(HINDI)]
    for name, content in (("xcopa/test.zh", rows), ("xcopa/val.zh", rows), ("xnli_hi/xnli_dev_hi", more)):
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in content), encoding="utf-8")
    return folder


def small(model: Path, rows: Path, **changes: Any) -> dict[str, Any]:
    """The tiny recipe cut down to one tuned and one realigned model, measured by XCOPA-zh and XNLI-hi, two seeds."""
    raw = copy.deepcopy(tiny_recipe(model))
    raw["tune"] = {"own": {**raw["tune"]["second"], "measured_by": ["xcopa_zh"]}}
    raw["realign"] = {"half": {"method": "interpolation", "kind": "realigned", "tuned": ["own"], "strength": 0.5}}
    raw["align"]["sft"]["steps"] = 3
    raw["data"]["data_dir"] = str(rows)
    raw["utility"] = {"tasks": ["xcopa_zh", "xnli_hi"]}
    return {**raw, "evaluate_base": True, "seeds": 2, **changes}


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("utility")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESAFE_CACHE", str(place / "cache"))
        raw = small(save_chat_model(place / "model"), data(place / "data"))
        run_recipe(check_recipe(raw, "tiny"), place / "run")
        assert run_recipe(check_recipe(raw, "tiny"), place / "run").redone == 0
    return place / "run"


@pytest.mark.slow
def test_seeds_are_pooled_item_by_item(seeded: Path) -> None:
    pooled = read_results(seeded / "results.json")
    each = [read_results(seeded / f"seed-{seed}" / "results.json") for seed in (0, 1)]
    assert pooled.training_seeds == (0, 1)
    assert [row.model for row in pooled.rows] == ["base", "aligned", "tuned-own", "half"]
    for row in pooled.rows:
        own = [results.row(row.model) for results in each]
        for name in ("xcopa_zh", "xnli_hi"):
            values = [one.benchmarks[name].value for one in own]
            assert row.benchmarks[name].value == pytest.approx(sum(values) / 2)
            assert row.benchmarks[name].n == 8  # four items, two seeds
            assert row.by_seed[name] == pytest.approx(values)
        assert row.harmful_refused.value == pytest.approx(sum(one.harmful_refused.value for one in own) / 2)
        assert row.perplexity == pytest.approx(sum(one.perplexity for one in own) / 2)
    assert list(pooled.row("half").utility_by_task) == ["xcopa_zh"]
    assert set(pooled.row("half").benchmark_changes) == {"xcopa_zh", "xnli_hi"}
    assert len(list((seeded / "stages").glob("utility-*"))) == 1 + 2 * 3  # the base model has no seed


@pytest.mark.slow
def test_hindi_and_chinese_survive_in_records_page_and_workbook(seeded: Path) -> None:
    import openpyxl

    from resafe.report import markdown_table

    records = read_records(seeded / "results.jsonl")
    page = (seeded / "report.html").read_text(encoding="utf-8")
    cells = {
        str(cell)
        for sheet in openpyxl.load_workbook(seeded / "results.xlsx", read_only=True)
        for row in sheet.iter_rows(values_only=True)
        for cell in row
    }
    for text in (*CHINESE, *HINDI):
        assert any(text in record.prompt for record in records)
        assert text in page
        assert any(text in cell for cell in cells)
    assert "xnli_hi" in markdown_table(read_results(seeded / "results.json"))
    assert 'id="training"' in page  # the loss curves
    assert "tuned-own, seed 1: 3 steps" in page


def test_programs_need_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESAFE_CACHE", str(tmp_path / "cache"))
    raw = small(save_chat_model(tmp_path / "model"), data(tmp_path / "data"), utility={"tasks": ["humaneval"]})
    raw["tune"]["own"]["measured_by"] = ["humaneval"]
    with pytest.raises(InputError, match="humaneval runs programs") as caught:
        run_recipe(check_recipe(raw, ""), tmp_path / "run")
    assert "--allow-code-execution" in caught.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("utility", "message"),
    [
        ({"tasks": ["xcopa_zh"], "limit": 0}, "a limit below 1"),
        ({"tasks": ["xcopa_zh"], "limit": {"copa": 5}}, "a limit for copa"),
        ({"tasks": ["xcopa_zh", "gms8k"]}, "gms8k"),
    ],
)
def test_what_cannot_be_measured_is_found_before_training(
    utility: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESAFE_CACHE", str(tmp_path / "cache"))
    raw = small(save_chat_model(tmp_path / "model"), data(tmp_path / "data"), utility=utility)
    raw["tune"]["own"] |= {"task": "xnli_hi_rest", "examples": 2}
    monkeypatch.setattr(Context, "mix", lambda *_: [])  # the rows are few here, and not what is tested
    with pytest.raises(InputError, match=message):
        run_recipe(check_recipe(raw, ""), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spelt", ["xnli_hi", "xnli-hi", "xcopa_zh,xnli_hi", "xnli"])
def test_rows_that_are_evaluated_are_not_trained_on_however_they_are_named(spelt: str, tmp_path: Path) -> None:
    raw = small(Path("m"), Path("d"), utility={"tasks": ["xcopa_zh", spelt]})
    context = Context(check_recipe(raw, ""), Run(tmp_path / "run", lambda line: None), Silent())
    with pytest.raises(InputError, match="xnli_hi_rest holds the rows"):
        context._check_held_out("xnli_hi_rest")
    context._check_held_out("alpaca_hindi")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utility": None}, "tune.own.measured_by: 'xcopa_zh' is not in utility.tasks; there: none"),
        ({"seeds": [1, 1]}, "seeds: one is named twice"),
        ({"realign": {"x": {"method": "interpolation", "tuned": ["own"]}}},
         "realign.x.strength: give one; 'own' has no validation questions"),
        ({"realign": {"base": {"method": "interpolation", "tuned": ["own"], "strength": 1.0}}},
         "realign: the name 'base' is taken"),
    ],
)  # fmt: skip
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_recipe(small(Path("m"), Path("d"), **changes), "r.yaml")
    assert message in caught.value.message


def test_fields_of_later_versions_leave_digests_alone() -> None:
    dumped = check_recipe(tiny_recipe(Path("m")), "").model_dump(mode="json")
    assert not {"seeds", "scale", "utility", "evaluate_base", "report"} & set(dumped)
    assert "epochs" not in dumped["align"]["sft"]
    assert "measured_by" not in dumped["tune"]["first"]
