"""`resafe validate`: checks a recipe without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def validate(
    recipe: Annotated[Path, typer.Argument(help="a recipe, a fusion file or a mask file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="fields to set: a.b=c")] = None,
) -> None:
    """Check a recipe (at all its scales) or a fusion file: fields, values, methods, settings. Loads no model."""
    from resafe.recipe import is_fusion, is_mask, load_fuse, load_mask, load_recipe

    if is_fusion(recipe):
        fusion = load_fuse(recipe, overrides or [])
        from resafe.fusion import FUSION

        FUSION.get(fusion.method).check(fusion.settings)
        typer.echo(f"{recipe}: valid")
        return
    if is_mask(recipe):
        mask = load_mask(recipe, overrides or [])
        from resafe.realign import REALIGN

        REALIGN.get("somf").check(mask.settings)
        typer.echo(f"{recipe}: valid")
        return
    loaded = load_recipe(recipe, overrides or [])
    from resafe.recipe.realign_stages import check_methods  # loads torch, so after the recipe's own mistakes

    check_methods(loaded)
    typer.echo(f"{recipe}: valid")
