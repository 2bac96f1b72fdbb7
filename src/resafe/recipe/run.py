"""A recipe executed into a run directory: align, tune, realign, evaluate, report. Finished stages are never redone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from resafe.checkpoints import ensure_space, load_model, save_model
from resafe.evals.calibration import merged, stored_calibration, to_json
from resafe.provenance import digest_value, versions
from resafe.realign import REALIGN
from resafe.recipe.context import Context, read_json
from resafe.recipe.eval_stages import evaluate, records_of
from resafe.recipe.realign_stages import check_methods, realign
from resafe.recipe.reporter import Reporter, Silent
from resafe.recipe.schema import Recipe
from resafe.recipe.stage import Run, Stage, locked
from resafe.recipe.train_stages import align, tune
from resafe.report import (
    ModelInfo,
    Point,
    Results,
    model_card,
    summarise,
    write_page,
    write_records,
    write_results,
    write_workbook,
)

JUDGE = (
    "Refusals are judged by rules on the opening of the answer; an answer that is empty or degenerate counts as "
    "broken, neither refused nor answered."
)
_ORIGIN = "resafe-stage.txt"
_ROOM = 2_000_000_000  # bytes: adapters of every stage, candidates, logs and the converted model


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        results: The table.
        root: The run directory.
        redone: Number of stages that were not already done.
    """

    results: Results
    root: Path
    redone: int


def run_recipe(recipe: Recipe, out: Path, reporter: Reporter | None = None) -> Outcome:
    """Runs a recipe, or what is left of it.

    Args:
        recipe: The recipe.
        out: The run directory.
        reporter: Where progress goes; None is silent.

    Raises:
        InputError: Something the recipe names is missing or wrong, there is no room on the disk, or another process
            is at work in `out`.
    """
    reporter = reporter or Silent()
    check_methods(recipe)
    if not (out / "stages").is_dir():  # a new run writes nothing where there is no room
        ensure_space(out, _ROOM)
    run = Run(out, reporter.say, _ROOM)
    context = Context(recipe, run, reporter)
    context.check()
    with locked(out):
        _write_text(out / "recipe.yaml", _as_yaml(recipe))
        aligned = align(context)
        tuned = {name: tune(context, name, aligned) for name in recipe.tune}
        realigned: dict[str, Stage] = {}
        for name in recipe.realign:
            realigned[name] = realign(context, name, aligned, tuned, realigned)
        infos, evaluations = _evaluate_all(context, aligned, tuned, realigned)
        results = _report(context, infos, evaluations, realigned)
    return Outcome(results, out, run.redone)


def _evaluate_all(
    context: Context, aligned: Stage, tuned: dict[str, Stage], realigned: dict[str, Stage]
) -> tuple[dict[str, ModelInfo], dict[str, Stage]]:
    recipe = context.recipe
    attacked = next(iter(recipe.tune))
    tasks = {task: f"tuned-{task}" for task in recipe.tune}
    infos = {"aligned": ModelInfo("aligned", "aligned", method="aligned adapter", tuned=tasks[attacked], tasks=tasks)}
    stages = {"aligned": evaluate(context, "aligned", aligned, context.open_stage(aligned), tuple(recipe.tune))}
    for task, stage in tuned.items():
        name, part = tasks[task], recipe.tune[task]
        note = f"{part.harmful_share:.0%} of the training examples were harmful" if part.harmful_share else ""
        infos[name] = ModelInfo(
            name, "tuned", method="fine-tuned", aligned="aligned", tasks={task: name}, note=note,
            settings={"harmful_share": part.harmful_share},
        )  # fmt: skip
        stages[name] = evaluate(context, name, stage, context.open_stage(stage), (task,))
    for name, stage in realigned.items():
        entry, method = recipe.realign[name], REALIGN.get(recipe.realign[name].method)
        selection = read_json(stage.path / "selection.json")
        infos[name] = ModelInfo(
            name, entry.kind, method=entry.title or method.title, source=method.source, aligned="aligned",
            tuned=tasks[entry.tuned[0]], tasks={task: tasks[task] for task in entry.tuned},
            settings={selection["strength_name"]: selection["strength"], **selection["facts"]},
        )  # fmt: skip
        stages[name] = evaluate(context, name, stage, context.open_stage(stage), tuple(entry.tuned))
    return infos, stages


def _report(
    context: Context, infos: dict[str, ModelInfo], evaluations: dict[str, Stage], realigned: dict[str, Stage]
) -> Results:
    """Writes results, workbook, page and the released model; cheap, so always done anew."""
    run, recipe = context.run, context.recipe
    records = [record for stage in evaluations.values() for record in records_of(stage)]
    perplexities = {name: float((stage.receipt or {})["facts"]["perplexity"]) for name, stage in evaluations.items()}
    shown = recipe.model_dump(mode="json")
    digests = {"base model": context.base.digest, "recipe": digest_value(shown)}
    digests |= {name: stage.digest for name, stage in evaluations.items()}
    results = summarise(
        records,
        infos,
        perplexities,
        seconds=run.seconds(),
        peak_memory_gb=run.peak_memory_gb(),
        headline=recipe.released,
        judge=JUDGE,
        versions=versions(),
        digests=digests,
        calibration=_calibration(),
        seed=recipe.seed,
    )
    write_records(run.root / "results.jsonl", records)
    write_results(run.root / "results.json", results)
    write_workbook(run.root / "results.xlsx", results, records)
    write_page(
        run.root / "report.html",
        results,
        records,
        title=recipe.title or recipe.name,
        curves_by_method=_curves(realigned),
        curves_note="Measured on validation questions, which are disjoint from those of the table.",
        recipe=_as_yaml(recipe),
    )
    _release(context, results, realigned[recipe.released])
    return results


def _calibration() -> dict[str, Any]:
    """What is known of the rule judge's agreement with people, for the set that stands for it."""
    found = stored_calibration("refusal")
    return {} if found is None else to_json(merged(found.judge, found.settings, found.measure, [found.best]))


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
        results, context.recipe.released, base_model=context.recipe.model.reference, recipe=_as_yaml(context.recipe)
    )
    if _released(root / "model") != (stage.digest, card):
        model = load_model(adapter)
        save_model(root / "model", model, adapter, card)  # type: ignore[arg-type]  # merged: no PeftModel
        shutil.rmtree(root / "adapter", ignore_errors=True)
        shutil.copytree(adapter.path, root / "adapter")
        if (stage.path / "mask").is_dir():
            shutil.copytree(stage.path / "mask", root / "adapter" / "mask")
        _write_text(root / "model" / _ORIGIN, stage.digest + "\n")


def _released(model: Path) -> tuple[str, str] | None:
    """The stage and the card of a released model that is complete (the note of its origin is written last)."""
    try:
        return (model / _ORIGIN).read_text().strip(), (model / "README.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _as_yaml(recipe: Recipe) -> str:
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
