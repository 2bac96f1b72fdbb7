"""docs/recipes.md: every field is there, and its example is a valid recipe."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from pydantic import BaseModel

from resafe.recipe import schema
from resafe.recipe.load import check_recipe
from resafe.recipe.realign_stages import check_methods
from tests.conftest import TinyRun

DOCS = Path(__file__).parents[2] / "docs"
PARTS = [kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, schema.Part)]


def test_every_field_is_documented() -> None:
    """In the page on recipes, or in those on tasks and data that it links to."""
    text = "".join((DOCS / page).read_text() for page in ("recipes.md", "tasks.md", "data.md"))
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    words = {word for span in re.findall(r"`[^`\n]+`", text) for word in re.findall(r"\w+", span)}
    fields = {field for part in PARTS for field in part.model_fields}
    assert issubclass(schema.Recipe, BaseModel) and len(fields) > 60
    assert sorted(fields - words) == []


def test_the_example_is_valid(tiny: TinyRun) -> None:
    block = re.search(r"```yaml\n(.*?)```", (DOCS / "recipes.md").read_text(), re.DOTALL)
    assert block is not None
    one = next(iter(tiny.raw["tune"].values()))
    raw = {**tiny.raw, "release": None, "tune": {"task": one, "other": one}, **yaml.safe_load(block[1])}
    recipe = check_recipe(raw, "")
    check_methods(recipe)
    assert list(recipe.realign) == ["somf", "same", "shuffled", "both"]
