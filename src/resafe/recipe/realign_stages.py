"""The stage that realigns: build a family of models, choose its strength on validation questions, write the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resafe.checkpoints import Checkpoint, open_checkpoint
from resafe.data.items import Example
from resafe.deltas import task_vectors
from resafe.errors import InputError
from resafe.evals import generate, refusal, score_answer
from resafe.evals.refusal import rules_digest
from resafe.evals.sets import QuestionSet
from resafe.fusion import FUSION, Fusion
from resafe.masks import PRESETS
from resafe.masks.average import average_directories
from resafe.masks.format import load_masks, save_masks
from resafe.provenance import described, digest_files, digest_value
from resafe.realign import REALIGN, Family, Problem, write_realigned
from resafe.recipe.context import Context, read_json
from resafe.recipe.schema import RealignPart, Recipe
from resafe.recipe.select import Candidate, ChoiceRule, Measured, choose, judge, unmeasured
from resafe.recipe.stage import Stage, write_json


def realign(context: Context, name: str, aligned: Stage, tuned: dict[str, Stage], earlier: dict[str, Stage]) -> Stage:
    """Runs one entry of `realign`; it gets `adapter/` (or `model/`), `selection.json` and, for masks, `mask/`."""
    part = context.recipe.realign[name]
    others = [earlier[other] for other in part.refers_to]

    def work(path: Path) -> dict[str, Any]:
        problem = _problem(context, part, aligned, tuned, path)
        family = _family(part, problem, others, path / "work" / "mean")
        if family.masks:
            save_masks(family.masks, path / "mask")
        like = context.open_stage(tuned[part.tuned[0]])
        candidates = _candidates(context, part, problem, family, aligned, tuned, like, path)
        chosen = choose(candidates, _rule(context))
        _write(path / context.part, problem, family, chosen.strength, like, name)
        for strength in family.strengths if part.frontier else ():
            _write(member_path(path, strength), problem, family, strength, like, name)
        selection = {
            "strength_name": family.strength,
            "strength": chosen.strength,
            "members": list(family.strengths) if part.frontier else [],
            "candidates": [asdict(candidate) for candidate in candidates] if len(candidates) > 1 else [],
            "facts": family.facts,
        }
        write_json(path / "selection.json", selection)
        return {"strength": chosen.strength, **family.facts}

    method, digests = REALIGN.get(part.method), [other.digest for other in others]
    depends = {
        # titles are for the report alone, and what does not ask for a frontier is what it was without the option
        "part": part.model_dump(mode="json", exclude={"title", "kind", *(() if part.frontier else ("frontier",))}),
        # A default that changes with the code changes the result as much as a setting in the recipe does.
        "defaults": [[p.name, repr(p.default)] for p in method.parameters if p.name not in method.traits["later"]],
        "presets": _presets(part) if method.traits["makes_mask"] else {},
        "aligned": aligned.digest,
        "tuned": [tuned[task].digest for task in part.tuned],
        "other": digests[0] if len(digests) == 1 else digests or None,
        "validation": None if part.strength is not None else _validation_digest(context, part.tuned),
        "seed": context.recipe.seed,
        "dtype": context.dtype,
    }
    if context.recipe.full and method.traits["trains"]:
        depends["masked"] = "every parameter that tuning changed"  # linear layers only, once, in the base's other ones
    if len(part.tuned) > 1 and method.traits["makes_mask"] and _distils(part):
        depends["teachers"] = "each task's own tuned model"  # what F made of them, once
    if mask := part.settings.get("mask"):
        depends["mask"] = digest_files(sorted(Path(mask).rglob("safety_mask.*")), Path(mask))
    if named := [part.settings[role] for role in ("base", "unaligned") if part.settings.get(role)]:
        depends["named"] = [open_checkpoint(reference).digest for reference in named]
    return context.run.stage(f"realign-{name}", depends, work)


def _presets(part: RealignPart) -> dict[str, Any]:
    """What the entry's preset stands for; the first two are always there, as stages were digested with both."""
    return {key: described(PRESETS[key]) for key in ("default", "paper", part.settings.get("preset", "default"))}


def _distils(part: RealignPart) -> bool:
    """Whether the tuned models are teachers of the entry's mask."""
    given = REALIGN.get(part.method).check(part.settings)
    if part.mask_of or given.get("mask"):
        return False
    training = PRESETS[given.get("preset") or "default"].training
    loss, divergence = given.get("loss") or training.loss, given.get("task_divergence")
    return loss == "distill" or (training.task_divergence if divergence is None else divergence) > 0


def member_path(stage: Path, strength: float) -> Path:
    """Where an entry with `frontier` keeps its model of one strength."""
    return stage / "members" / f"{strength:g}"


def _rule(context: Context) -> ChoiceRule:
    asked = context.recipe.questions.validation
    return ChoiceRule(asked.allowed_over_refusal, asked.over_refusal_price)


def _validation_digest(context: Context, tasks: list[str]) -> str:
    """SHA-256 of all that the choice of a strength depends on beside the models."""
    asked = context.recipe.questions
    sets = [context.task_set(task, "validation", asked.validation.task) for task in tasks]
    questions = [context.harmful("validation"), context.harmless("validation"), *(s.questions for s in sets)]
    limits = [asked.validation.max_new_tokens, asked.task_max_new_tokens]
    listed = [[(q.prompt, q.target) for q in part] for part in questions]
    return digest_value([limits, _rule(context).described(), rules_digest(), listed])


def _problem(context: Context, part: RealignPart, aligned: Stage, tuned: dict[str, Stage], path: Path) -> Problem:
    safe = context.open_stage(aligned)
    vectors = task_vectors([context.open_stage(tuned[task]) for task in part.tuned], safe)
    keep: list[Example] = []
    keep_of: list[int] = []
    for place, task in enumerate(part.tuned):  # a few examples of the task itself; the attack's rows are not among them
        few = context.task_pool(context.recipe.tune[task])[:200]
        keep += few
        keep_of += [place] * len(few)
    return Problem(
        vectors=vectors,
        fusion=Fusion(part.fusion.name, part.fusion.settings, context.recipe.seed, tuple(part.tuned)),
        pairs=context.material.pairs,
        keep=keep,
        keep_of=keep_of,
        source=context,
        seed=context.recipe.seed,
        work=path / "work",
        progress=context.reporter.bar(f"realign: {part.method}", "steps"),
    )


def check_methods(recipe: Recipe) -> None:
    """Checks every entry's method, fusion and settings: a wrong one is found now, not after an hour of training.

    Raises:
        InputError: A method or setting is unknown (the nearest is named) or has a wrong value.
    """
    for entry in recipe.realign.values():
        borrowed: dict[str, Any] = {"removed": [0.5]} if entry.keep_rate_of else {}
        borrowed |= {"mask": "mask"} if entry.mask_of else {}
        REALIGN.get(entry.method).check({**entry.settings, **borrowed})
        for source in entry.refers_to:
            if not REALIGN.get(recipe.realign[source].method).traits["makes_mask"]:
                raise InputError(
                    f"'{source}' makes no mask, and another entry refers to its mask",
                    "refer to an entry with method: somf",
                )
        FUSION.get(entry.fusion.name).check(entry.fusion.settings)


def _family(part: RealignPart, problem: Problem, others: Sequence[Stage], mean: Path) -> Family:
    """An entry's family; the mean of several masks is written to `mean` first."""
    method = REALIGN.get(part.method)
    settings = dict(part.settings)
    if part.keep_rate_of:
        settings["removed"] = [1.0 - _kept(others[0])]
    elif others:
        masks = [other.path / "mask" for other in others]
        if len(masks) > 1:
            save_masks(average_directories(masks), mean)
        settings["mask"] = str(masks[0] if len(masks) == 1 else mean)
    family: Family = method.function(problem, **method.check(settings))
    return family


def _kept(stage: Stage) -> float:
    """The share of the task vectors' entries that a stage's masks keep at the strength that was chosen for them."""
    strength = float(read_json(stage.path / "selection.json")["strength"])
    masks = load_masks(stage.path / "mask")
    return sum(mask.keep_rate_at(strength) for mask in masks) / len(masks)


def _write(out: Path, problem: Problem, family: Family, strength: float, tuned: Checkpoint, name: str) -> Path:
    card = f"# {name}\n\nWritten by resafe; {family.strength} {strength:g}.\n"
    return write_realigned(out, problem.vectors, family.at(strength), tuned, card)


def _candidates(
    context: Context,
    part: RealignPart,
    problem: Problem,
    family: Family,
    aligned: Stage,
    tuned: dict[str, Stage],
    like: Checkpoint,
    path: Path,
) -> list[Candidate]:
    """Every strength with its figures, kept as they come, so that a killed stage goes on; one strength needs none."""
    grid = family.strengths if part.strength is None else (part.strength,)
    if len(grid) == 1:
        return [unmeasured(grid[0])]
    validation = _Validation(context, part, aligned, tuned)
    tick = context.reporter.bar("choose strength", "models")
    found = []
    for number, strength in enumerate(grid):
        store = path / "work" / f"validation-{number}.json"
        if not store.is_file():
            out = _write(path / "work" / "candidate", problem, family, strength, like, "candidate")
            write_json(store, asdict(validation.measure(open_checkpoint(out), validation.tasks)))
        found.append(validation.judged(strength, Measured(**read_json(store))))
        tick(number + 1, len(grid), {})
    return found


class _Validation:
    """Validation items and the figures of the aligned and tuned models on them."""

    def __init__(self, context: Context, part: RealignPart, aligned: Stage, tuned: dict[str, Stage]) -> None:
        self.context = context
        asked = context.recipe.questions.validation
        self.harmful = [question.prompt for question in context.harmful("validation")]
        self.harmless = [question.prompt for question in context.harmless("validation")]
        self.tasks = [context.task_set(task, "validation", asked.task) for task in part.tuned]
        self.aligned = self._reference(aligned, self.tasks)
        # For several tasks each task's own tuned model sets what there was to keep; the first, what was lost.
        pairs = zip(part.tuned, self.tasks, strict=True)
        each = [self._reference(tuned[task], [questions]) for task, questions in pairs]
        utility = sum(measured.utility for measured in each) / len(each)
        self.tuned = Measured(each[0].harmful_refused, each[0].harmless_refused, utility)

    def _reference(self, stage: Stage, tasks: list[QuestionSet]) -> Measured:
        """Validation figures of the aligned or a tuned model, measured once for all entries of a run."""
        lengths = [self.context.recipe.questions.validation.max_new_tokens, *(task.max_new_tokens for task in tasks)]
        asked = [lengths, self.harmful, self.harmless, [q.prompt for task in tasks for q in task.questions]]
        key = digest_value([stage.digest, asked, self.context.dtype, rules_digest()])[:16]
        store = self.context.run.root / "stages" / "validation" / f"{key}.json"
        if not store.is_file():
            store.parent.mkdir(parents=True, exist_ok=True)
            write_json(store, asdict(self.measure(self.context.open_stage(stage), tasks)))
        return Measured(**read_json(store))

    def judged(self, strength: float, measured: Measured) -> Candidate:
        """One strength's figures beside those of the aligned and the tuned model."""
        return judge(strength, measured, self.aligned, self.tuned, _rule(self.context))

    def measure(self, checkpoint: Checkpoint, tasks: list[QuestionSet]) -> Measured:
        """Greedy answers to all items, judged by rule."""
        model = self.context.load(checkpoint)
        asked = self.context.recipe.questions
        prompts = [*self.harmful, *self.harmless, *(q.prompt for task in tasks for q in task.questions)]
        sides = len(self.harmful) + len(self.harmless)
        limits = [asked.validation.max_new_tokens] * sides + [asked.task_max_new_tokens] * (len(prompts) - sides)
        answers = generate(
            model,
            self.context.tokenizer,
            prompts,
            system=self.context.system,
            max_new_tokens=limits,
            batch_size=asked.batch_size,
        )
        refused = [float(refusal(answer) == "refused") for answer in answers[:sides]]
        rest = iter(answers[sides:])
        utility = []
        for task in tasks:
            kind: Any = task.scoring
            scores = [score_answer(kind, next(rest), question.target or "") for question in task.questions]
            utility.append(sum(scores) / len(scores))
        harmful, harmless = refused[: len(self.harmful)], refused[len(self.harmful) :]
        return Measured(sum(harmful) / len(harmful), sum(harmless) / len(harmless), sum(utility) / max(1, len(utility)))
