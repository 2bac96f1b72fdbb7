"""Recipes: their schema, overrides, stages and execution. Reading a recipe imports no torch; running one does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resafe.recipe.fuse import FuseRecipe
from resafe.recipe.load import check_recipe, is_fusion, is_mask, load_fuse, load_mask, load_recipe
from resafe.recipe.mask import MaskRecipe
from resafe.recipe.schema import Recipe

if TYPE_CHECKING:
    from resafe.recipe.run import Outcome, run_recipe

__all__ = [
    "FuseRecipe",
    "MaskRecipe",
    "Outcome",
    "Recipe",
    "check_recipe",
    "is_fusion",
    "is_mask",
    "load_fuse",
    "load_mask",
    "load_recipe",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    if name in ("Outcome", "run_recipe"):
        from resafe.recipe import run

        return getattr(run, name)
    raise AttributeError(f"module 'resafe.recipe' has no attribute '{name}'")
