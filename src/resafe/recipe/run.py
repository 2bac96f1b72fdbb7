"""A recipe executed into a run directory: align, tune, realign, evaluate, report. Finished stages are never redone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from resafe.checkpoints import Checkpoint, ensure_space
from resafe.provenance import digest_value
from resafe.realign import REALIGN
from resafe.recipe.context import Context, read_json
from resafe.recipe.eval_stages import evaluate
from resafe.recipe.frontier_stage import measure_frontier
from resafe.recipe.outputs import as_yaml, write_text
from resafe.recipe.outputs import report as _report
from resafe.recipe.realign_stages import check_methods, realign
from resafe.recipe.reporter import Reporter, Silent
from resafe.recipe.schema import Recipe
from resafe.recipe.stage import Run, Stage, locked, write_json
from resafe.recipe.train_stages import align, losses, tune
from resafe.recipe.utility_stage import measure_utility
from resafe.report import ModelInfo, Results

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


@dataclass
class SeedRun:
    """What a recipe made with one seed.

    Attributes:
        context: The run with this seed.
        realigned: Entry of `realign` → its stage.
        infos: Model → its role.
        evaluations: Model → the stage with its answers to questions.
        utilities: Model → the stage with its answers to the tasks of lm-eval, where the recipe has any.
        losses: Training → the loss of each step.
        frontiers: Entry with `frontier` → strength → the stage with its answers.
    """

    context: Context
    realigned: dict[str, Stage] = field(default_factory=dict)
    infos: dict[str, ModelInfo] = field(default_factory=dict)
    evaluations: dict[str, Stage] = field(default_factory=dict)
    utilities: dict[str, Stage] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    frontiers: dict[str, dict[float, Stage]] = field(default_factory=dict)

    def measure(self, info: ModelInfo, stage: Stage, checkpoint: Checkpoint, tasks: tuple[str, ...]) -> None:
        """Evaluates one model on the questions and on the tasks of lm-eval."""
        self.infos[info.name] = info
        self.evaluations[info.name] = evaluate(self.context, info.name, stage, checkpoint, tasks)
        found = measure_utility(self.context, info.name, stage, checkpoint)
        if found is not None:
            self.utilities[info.name] = found


def run_recipe(
    recipe: Recipe,
    out: Path,
    reporter: Reporter | None = None,
    *,
    allow_code_execution: bool = False,
    allow_unconfined_code: bool = False,
) -> Outcome:
    """Runs a recipe, or what is left of it.

    Args:
        recipe: The recipe.
        out: The run directory.
        reporter: Where progress goes; None is silent.
        allow_code_execution: Run the programs that models write for HumanEval, in a sandbox.
        allow_unconfined_code: Run them also where the kernel has no namespaces to shut them in.

    Raises:
        InputError: Something the recipe names is missing or wrong, there is no room on the disk, or another process
            is at work in `out`.
    """
    reporter = reporter or Silent()
    check_methods(recipe)
    if not (out / "stages").is_dir():  # a new run writes nothing where there is no room
        ensure_space(out, _ROOM)
    run = Run(out, reporter.say, _ROOM)
    context = Context(recipe, run, reporter, allow_code_execution, allow_unconfined_code)
    contexts = [context.with_seed(seed) for seed in recipe.seeds] if recipe.seeds else [context]
    for one in contexts:
        one.check()
    account = contexts[0].account()  # the same rows are read for all seeds
    for line in contexts[0].left_out():
        reporter.say(line)
    with locked(out):
        write_text(out / "recipe.yaml", as_yaml(recipe))
        if account["align"]["sources"] or account["tune"]:  # of the shipped rows there is nothing to tell
            write_json(out / "data.json", account)
        made = []
        for one in contexts:
            if len(contexts) > 1:
                reporter.say(f"seed {one.recipe.seed}")
            made.append(_one_seed(one))
        results = _report(context, made)
    return Outcome(results, out, run.redone)


def _one_seed(context: Context) -> SeedRun:
    recipe, made = context.recipe, SeedRun(context)
    aligned = align(context)
    tuned = {name: tune(context, name, aligned) for name in recipe.tune}
    for name in recipe.realign:
        made.realigned[name] = realign(context, name, aligned, tuned, made.realigned)
    made.losses.update(losses(aligned, "aligned"))
    for name, stage in tuned.items():
        made.losses.update(losses(stage, f"tuned-{name}"))
    _evaluate_all(made, aligned, tuned)
    return made


def _evaluate_all(made: SeedRun, aligned: Stage, tuned: dict[str, Stage]) -> None:
    context, recipe = made.context, made.context.recipe
    attacked = next(iter(recipe.tune))
    names = {task: f"tuned-{task}" for task in recipe.tune}
    # The sets of items that measure a task, and the model tuned on it.
    sets = {task: {item: names[task] for item in part.measured_by or [task]} for task, part in recipe.tune.items()}
    every = {item: name for found in sets.values() for item, name in found.items()}
    if recipe.evaluate_base:
        base = Stage("base", digest_value([context.base.digest, context.system]), context.run.root)
        info = ModelInfo("base", "base", method="as it came", tasks=every)
        made.measure(info, base, context.base, tuple(recipe.tune))
    trained = "model" if recipe.full else "adapter"
    info = ModelInfo("aligned", "aligned", method=f"aligned {trained}", tuned=names[attacked], tasks=every)
    made.measure(info, aligned, context.open_stage(aligned), tuple(recipe.tune))
    for task, stage in tuned.items():
        part = recipe.tune[task]
        note = f"{part.harmful_share:.0%} of the training examples were harmful" if part.harmful_share else ""
        info = ModelInfo(
            names[task], "tuned", method="fine-tuned", aligned="aligned", tasks=sets[task], note=note,
            settings={"harmful_share": part.harmful_share},
        )  # fmt: skip
        made.measure(info, stage, context.open_stage(stage), (task,))
    for name, stage in made.realigned.items():
        entry, method = recipe.realign[name], REALIGN.get(recipe.realign[name].method)
        selection = read_json(stage.path / "selection.json")
        info = ModelInfo(
            name, entry.kind, method=entry.title or method.title, source=method.source, aligned="aligned",
            tuned=names[entry.tuned[0]], tasks={item: to for task in entry.tuned for item, to in sets[task].items()},
            settings={selection["strength_name"]: selection["strength"], **selection["facts"]},
        )  # fmt: skip
        made.measure(info, stage, context.open_stage(stage), tuple(entry.tuned))
        if found := measure_frontier(context, name, stage, made.evaluations[name]):
            made.frontiers[name] = found
