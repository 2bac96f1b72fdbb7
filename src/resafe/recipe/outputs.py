"""What a finished run leaves: results, records, workbook, page and the released model. Cheap, so always written anew.

A run over several seeds has the pooled table at its top and a folder `seed-N` with the table of each.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from resafe.checkpoints import load_model, save_model
from resafe.evals.calibration import report_json, stored_calibration
from resafe.evals.records import Record
from resafe.provenance import digest_value, versions
from resafe.recipe.context import Context, read_json
from resafe.recipe.eval_stages import records_of
from resafe.recipe.frontier_stage import write_frontiers
from resafe.recipe.schema import Recipe
from resafe.recipe.stage import Stage
from resafe.report import (
    ModelInfo,
    Point,
    Results,
    correction,
    model_card,
    summarise,
    summarise_seeds,
    write_page,
    write_records,
    write_results,
    write_workbook,
)

if TYPE_CHECKING:
    from resafe.recipe.run import SeedRun

JUDGE = (
    "Refusals are judged by rules on the opening of the answer; an answer that is empty or degenerate counts as "
    "broken, neither refused nor answered."
)
_ORIGIN = "resafe-stage.txt"


def report(context: Context, made: Sequence[SeedRun]) -> Results:
    """Writes results, records, workbook, page and the released model.

    Args:
        context: The run, with the whole recipe.
        made: What each seed gave; with several, each has its own table too and the one at the top is pooled.
    """
    root, pooled = context.run.root, len(made) > 1
    records = [_records(one) for one in made]
    for one, own in zip(made, records, strict=True):
        seed = one.context.recipe.seed
        results = summarise(own, _with_benchmarks(one, own), _perplexities(one), **_common(one.context, [one]))
        place = root / f"seed-{seed}" if pooled else root
        _write(place, results, own, own, one.context.recipe, [one])
        write_frontiers(place, one)
    if pooled:
        infos = _with_benchmarks(made[0], records[0])
        seeds = [one.context.recipe.seed for one in made]
        results = summarise_seeds(
            dict(zip(seeds, records, strict=True)), _joined(infos, made), [_perplexities(one) for one in made],
            **_common(context, made),
        )  # fmt: skip
        every = [
            replace(record, model=f"{record.model}, seed {seed}")
            for seed, own in zip(seeds, records, strict=True)
            for record in own
        ]
        _write(root, results, records[0], every, context.recipe, made)
    if context.recipe.released:
        _release(made[0].context, results, made[0].realigned[context.recipe.released])
    return results


def _records(one: SeedRun) -> list[Record]:
    stages = [*one.evaluations.values(), *one.utilities.values()]
    return [record for stage in stages for record in records_of(stage)]


def _with_benchmarks(one: SeedRun, records: Sequence[Record]) -> dict[str, ModelInfo]:
    """The models with the sets of lm-eval that they were measured on."""
    own = set(one.context.recipe.tune)
    sets = dict.fromkeys(record.set for record in records if record.side == "task" and record.set not in own)
    return {name: replace(info, benchmarks=tuple(sets)) for name, info in one.infos.items()}


def _perplexities(one: SeedRun) -> dict[str, float]:
    return {name: float((stage.receipt or {})["facts"]["perplexity"]) for name, stage in one.evaluations.items()}


def _joined(infos: Mapping[str, ModelInfo], made: Sequence[SeedRun]) -> dict[str, ModelInfo]:
    """The models of the first seed, with settings that differ between seeds given for each."""
    found = {}
    for name, info in infos.items():
        settings: dict[str, Any] = {}
        for key in info.settings:
            values = [one.infos[name].settings.get(key) for one in made]
            settings[key] = values[0] if all(value == values[0] for value in values) else values
        found[name] = replace(info, settings=settings)
    return found


def _common(context: Context, made: Sequence[SeedRun]) -> dict[str, Any]:
    run, recipe = context.run, context.recipe
    digests = {"base model": context.base.digest, "recipe": digest_value(recipe.model_dump(mode="json"))}
    for one in made:
        mark = f", seed {one.context.recipe.seed}" if len(made) > 1 else ""
        digests |= {f"{name}{mark}": stage.digest for name, stage in one.evaluations.items()}
        digests |= {f"{name}, utility{mark}": stage.digest for name, stage in one.utilities.items()}
    return {
        "seconds": run.seconds(),
        "peak_memory_gb": run.peak_memory_gb(),
        "headline": recipe.released,
        "judge": JUDGE,
        "versions": versions(),
        "digests": digests,
        "calibration": report_json(stored_calibration("refusal")),
        "seed": recipe.seed,
    }


def _write(
    root: Path,
    results: Results,
    shown: Sequence[Record],
    records: Sequence[Record],
    recipe: Recipe,
    made: Sequence[SeedRun],
) -> None:
    """The files of one table; `shown` are the records whose answers stand side by side on the page."""
    write_records(root / "results.jsonl", records)
    write_results(root / "results.json", results)
    fixed = correction(results) if recipe.report.corrected else None
    write_workbook(root / "results.xlsx", results, records, shown, fixed)
    write_page(
        root / "report.html",
        results,
        shown,
        title=recipe.title or recipe.name,
        curves_by_method=_curves(made[0].realigned),
        curves_note="Measured on validation questions, which are disjoint from those of the table.",
        losses=_losses(made),
        recipe=as_yaml(recipe),
        correction=fixed,
    )


def _losses(made: Sequence[SeedRun]) -> dict[str, list[float]]:
    if len(made) == 1:
        return made[0].losses
    return {f"{name}, seed {one.context.recipe.seed}": line for one in made for name, line in one.losses.items()}


def _curves(realigned: dict[str, Stage]) -> dict[str, list[Point]]:
    """The strengths of every method as they were measured on validation items."""
    curves: dict[str, list[Point]] = {}
    for name, stage in realigned.items():
        selection = read_json(stage.path / "selection.json")
        if len(selection["candidates"]) > 1:
            curves[name] = [_point(candidate, selection["strength"]) for candidate in selection["candidates"]]
    return curves


def _point(candidate: dict[str, Any], chosen: float) -> Point:
    measured, strength = candidate["measured"], candidate["strength"]
    return Point(
        strength, measured["harmful_refused"], measured["utility"], measured["harmless_refused"], strength == chosen
    )


def _release(context: Context, results: Results, stage: Stage) -> None:
    """Writes the released model to OUT/model, merged, so that it loads anywhere; its adapter and mask to OUT/adapter.

    The adapter names the base model of this machine; it is there to be studied and applied again.
    """
    adapter, root = context.open_stage(stage), context.run.root
    card = model_card(
        results, context.recipe.released, base_model=context.recipe.model.reference, recipe=as_yaml(context.recipe)
    )
    if _released(root / "model") != (stage.digest, card):
        model = load_model(adapter)
        save_model(root / "model", model, adapter, card)  # type: ignore[arg-type]  # merged: no PeftModel
        shutil.rmtree(root / "adapter", ignore_errors=True)
        if adapter.kind == "adapter":
            shutil.copytree(adapter.path, root / "adapter")
        if (stage.path / "mask").is_dir():
            shutil.copytree(stage.path / "mask", root / "adapter" / "mask")
        write_text(root / "model" / _ORIGIN, stage.digest + "\n")


def _released(model: Path) -> tuple[str, str] | None:
    """The stage and the card of a released model that is complete (the note of its origin is written last)."""
    try:
        return (model / _ORIGIN).read_text().strip(), (model / "README.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, with its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
