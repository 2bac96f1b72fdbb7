"""Every strength of an entry on the test questions, where the recipe asks for its frontier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.checkpoints import open_checkpoint
from resafe.recipe.context import Context, read_json
from resafe.recipe.eval_stages import evaluate, records_of
from resafe.recipe.realign_stages import member_path
from resafe.recipe.stage import Stage, write_json
from resafe.report import write_records

if TYPE_CHECKING:
    from resafe.recipe.run import SeedRun


_CANDIDATE = ("measured", "recovery", "retention", "excess")  # what the choice of a strength looks at


def measure_frontier(context: Context, name: str, stage: Stage, chosen: Stage) -> dict[float, Stage]:
    """Strength → the evaluation of its model; empty without `frontier`. The chosen one's, `chosen`, is there already.

    Args:
        context: The run.
        name: The entry of `realign`.
        stage: Its stage.
        chosen: The evaluation of the strength that was chosen on validation questions.
    """
    selection = read_json(stage.path / "selection.json")
    tasks = tuple(context.recipe.realign[name].tuned)
    return {
        strength: chosen
        if strength == selection["strength"]
        else evaluate(context, f"{name}-{strength:g}", stage, open_checkpoint(member_path(stage.path, strength)), tasks)
        for strength in selection.get("members", [])
    }


def write_frontiers(root: Path, one: SeedRun) -> None:
    """Writes `frontier.jsonl` (records; models are called name@strength) and `frontier.json` (what they are)."""
    if not one.frontiers:
        for name in ("frontier.jsonl", "frontier.json"):  # of an earlier recipe in this directory
            (root / name).unlink(missing_ok=True)
        return
    records = [
        replace(record, model=f"{name}@{strength:g}")
        for name, members in one.frontiers.items()
        for strength, stage in members.items()
        for record in records_of(stage)
    ]
    write_records(root / "frontier.jsonl", records)
    write_json(root / "frontier.json", {name: _facts(name, one) for name in one.frontiers})


def _facts(name: str, one: SeedRun) -> list[dict[str, Any]]:
    selection = read_json(one.realigned[name].path / "selection.json")
    chosen, kept = selection["strength"], selection["facts"].get("keep_rate")  # of a mask, at strength 1
    validation = {each["strength"]: {key: each[key] for key in _CANDIDATE} for each in selection["candidates"]}
    return [
        {
            "model": f"{name}@{strength:g}",
            "strength": strength,
            "chosen": strength == chosen,
            "perplexity": (stage.receipt or {})["facts"]["perplexity"],
            **({} if kept is None else {"keep_rate": kept}),
            **({"validation": validation[strength]} if strength in validation else {}),
        }
        for strength, stage in one.frontiers[name].items()
    ]
