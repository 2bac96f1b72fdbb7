"""Recipes from YAML: every mistake is named, with its place and the nearest right name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from resafe.errors import InputError
from resafe.realign import REALIGN
from resafe.recipe import check_recipe, is_fusion, is_mask, load_fuse, load_mask, load_recipe
from tests.recipe.tiny import tiny_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def changed(**changes: Any) -> dict[str, Any]:
    """The tiny recipe with fields set by dotted name (`__` for the dot); a value of `...` removes the field."""
    raw = copy.deepcopy(tiny_recipe(Path("model")))
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        place = raw
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[leaf]
        else:
            place[leaf] = value
    return raw


def mistakes(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(InputError) as caught:
        check_recipe(raw, "r.yaml")
    head, *lines = caught.value.message.split("\n  ")
    assert head == f"r.yaml: {len(lines)} mistake{'s' if len(lines) > 1 else ''}"
    return lines


def test_the_recipes_fields_arrive() -> None:
    recipe = check_recipe(changed(), "r.yaml")
    assert recipe.tune["first"].harmful_share == 0.2
    assert recipe.tune["second"].harmful_share == 0.0  # the default: benign
    assert recipe.align.sft.batch_size == 8
    assert recipe.realign["fused"].fusion.name == "average"
    assert recipe.questions.batch_size == 128
    assert recipe.released == "mask"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"modle": {}}, "modle: unknown field (did you mean 'model'?)"),
        ({"align__sft__step": 3}, "align.sft.step: unknown field (did you mean 'steps'?)"),
        ({"tune__first__harmful": 0.1}, "tune.first.harmful: unknown field (did you mean 'harmful_share'?)"),
        ({"realign__mask__keep_rate": "x"}, "realign.mask.keep_rate: unknown field (did you mean 'keep_rate_of'?)"),
        ({"align__dpo": {"steps": 1, "learning_rate": 1, "betta": 1}},
         "align.dpo.betta: unknown field (did you mean 'beta'?)"),
        ({"questions__validation__harmfull": 1},
         "questions.validation.harmfull: unknown field (did you mean 'harmful'?)"),
        ({"model": ...}, "model: this field is needed"),
        ({"align__sft__steps": ...}, "align.sft: give one of steps and epochs"),
        ({"align__sft__steps": "many"}, "align.sft.steps: Input should be a valid integer"),
        ({"align__sft__steps": 0}, "align.sft.steps: Input should be greater than or equal to 1"),
        ({"tune__first__harmful_share": 1.0}, "tune.first.harmful_share: Input should be less than 1"),
        ({"device": "tpu"}, "device: Input should be 'auto', 'cpu' or 'cuda'"),
        ({"realign__mask__kind": "best"}, "realign.mask.kind: Input should be 'realigned' or 'baseline'"),
        ({"realign__half__tuned": []}, "realign.half.tuned: List should have at least 1 item"),
        ({"realign__half__tuned": ["third"]},
         "realign.half.tuned: no tuned model 'third'; known: first, second"),
        ({"realign__mask__keep_rate_of": "random"},
         "realign.mask.keep_rate_of: no earlier entry 'random'; earlier ones: none"),
        ({"realign__half__mask_of": "fused"},
         "realign.half.mask_of: no earlier entry 'fused'; earlier ones: mask, random"),
        ({"realign__random__mask_of": "mask"},
         "realign.random: keep_rate_of and mask_of exclude each other; give one of them"),
        ({"realign__half__mask_of": ["mask", "fused"]},
         "realign.half.mask_of: no earlier entry 'fused'; earlier ones: mask, random"),
        ({"realign__half__mask_of": ["mask", "mask"]},
         "realign.half.mask_of: names 'mask' twice; name each entry once"),
        ({"realign__half__mask_of": []}, "realign.half.mask_of: names no entry; name one, or leave it out"),
        ({"realign__aligned": {"method": "interpolation", "tuned": ["first"]}},
         "realign: the name 'aligned' is taken; choose another"),
        ({"realign__tuned-first": {"method": "interpolation", "tuned": ["first"]}},
         "realign: the name 'tuned-first' is taken; choose another"),
        ({"tune__harmful": {"task": "arithmetic", "examples": 1, "steps": 1, "learning_rate": 1}},
         "tune: the name 'harmful' is taken; choose another"),
        ({"realign__a/b": {"method": "interpolation", "tuned": ["first"]}},
         "'a/b' cannot be a name: use letters, digits, '.', '_' and '-'"),
        ({"release": "other"}, "release: no entry 'other' in realign; known: mask, random, half, fused"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(changes: dict[str, Any], line: str) -> None:
    (found,) = mistakes(changed(**changes))
    assert found.startswith(line)


def test_all_mistakes_are_listed_at_once() -> None:
    found = mistakes(changed(titel="x", align__sft__steps=-1, tune__first__task=...))
    assert [line.split(":")[0] for line in found] == ["align.sft.steps", "tune.first.task", "titel"]


def test_overrides_reach_nested_fields(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(changed(align__dpo=None)))
    recipe = load_recipe(
        path,
        [
            "align.sft.steps=50",
            "tune.first.learning_rate=1e-3",
            "realign.half.settings.removed=[0.1, 0.2]",
            "questions.validation.task=7",  # `validation` is there
            "data.safety=[a.jsonl]",
            "align.dpo.steps=3",  # a group that the recipe sets to null
            "align.dpo.learning_rate=0.5",
            "seed = 4",
        ],
    )
    assert recipe.align.sft.steps == 50
    assert recipe.tune["first"].learning_rate == 0.001
    assert recipe.realign["half"].settings == {"removed": [0.1, 0.2]}
    assert recipe.questions.validation.task == 7
    assert recipe.data.safety == ["a.jsonl"]
    assert recipe.align.dpo is not None
    assert (recipe.align.dpo.steps, recipe.align.dpo.learning_rate) == (3, 0.5)
    assert recipe.seed == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed' is not of the form a.b=c"),
        ("=3", "override '=3' is not of the form a.b=c"),
        ("name.x=1", "override 'name.x=1': 'name' is not a group of fields"),
        ("name.x.y=1", "override 'name.x.y=1': 'name' is not a group of fields"),
        ("align.sft.steps.x=1", "override 'align.sft.steps.x=1': 'align.sft.steps' is not a group of fields"),
        ("title=a: [b", "override 'title=a: [b': the value is not valid YAML"),
        ("align.sft.stpes=5", "1 mistake\n  align.sft.stpes: unknown field (did you mean 'steps'?)"),
        ("seed=", "1 mistake\n  seed: Input should be a valid integer"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(changed()))
    with pytest.raises(InputError) as caught:
        load_recipe(path, [override])
    assert message in caught.value.message
    assert caught.value.hint


def test_a_missing_recipe_lists_those_beside_it(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yml", "c.txt"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="no such recipe") as caught:
        load_recipe(tmp_path / "demo.yaml")
    assert caught.value.hint == "recipes there: a.yml, b.yaml"
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "nowhere" / "demo.yaml")
    assert caught.value.hint == "check the path"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [a\nb: c", "not valid YAML: .*line 2"),
        (b"- a\n- b\n", "a recipe is a mapping of fields"),
        (b"", "a recipe is a mapping of fields"),
        (b"name: \xff\xfe", "not valid YAML"),
    ],
)
def test_what_is_not_a_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=[path.name for path in RECIPES])
def test_the_recipes_that_ship_are_valid(path: Path) -> None:
    from resafe.recipe.realign_stages import check_methods

    if is_fusion(path):
        assert len(load_fuse(path).models) == 2
        return
    if is_mask(path):
        REALIGN.get("somf").check(load_mask(path).settings)
        return
    recipe = load_recipe(path)
    check_methods(recipe)
    assert recipe.name == path.stem  # so that they do not share a run directory


def test_there_are_recipes() -> None:
    assert "demo.yaml" in [path.name for path in RECIPES]
