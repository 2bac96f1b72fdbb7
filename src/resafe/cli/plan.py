"""`resafe plan`: what a run or a fusion would do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def plan(
    recipe: Annotated[Path, typer.Argument(help="a recipe, or a fusion file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="fields to set: a.b=c")] = None,
    scale: Annotated[str | None, typer.Option(help="a section of the recipe's `scale`, e.g. smoke")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Print the stages of a recipe, or all that a fusion would do, without doing it: headers are read, no tensor."""
    from resafe.recipe import is_fusion, load_recipe

    if is_fusion(recipe):
        from resafe.cli.fuse import show_plan

        show_plan(recipe, overrides or [], as_json)
        return
    loaded = load_recipe(recipe, overrides or [], scale)
    stages = ["align", *(f"tune-{task}" for task in loaded.tune), *(f"realign-{name}" for name in loaded.realign)]
    models = [
        *(["base"] if loaded.evaluate_base else []),
        "aligned",
        *(f"tuned-{task}" for task in loaded.tune),
        *loaded.realign,
    ]
    kinds = ["evaluate", "utility"] if loaded.utility else ["evaluate"]
    stages += [f"{kind}-{model}" for model in models for kind in kinds]
    if loaded.seeds and len(loaded.seeds) > 1:  # the base model has no seed: it is evaluated once
        stages = [f"{stage}, seed {seed}" for seed in loaded.seeds for stage in stages]
    stages.append("report")
    if as_json:
        sys.stdout.write(json.dumps({"recipe": loaded.name, "stages": stages}) + "\n")
    else:
        sys.stdout.write("\n".join(stages) + "\n")
