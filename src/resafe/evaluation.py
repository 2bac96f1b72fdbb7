"""`resafe.evaluate`: safety, over-refusal and usefulness in one call, as one table of recovery and retention."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.checkpoints import Checkpoint, load_tokenizer
from resafe.errors import InputError
from resafe.evals.calibration import report_json
from resafe.evals.judge import BROKEN, PARTIAL, REFUSED, UNSCORED, judge_named
from resafe.evals.records import Record
from resafe.evals.safety import SafetyResult, SafetySettings, Subject, evaluate_safety, subjects
from resafe.evals.safety.run import Reporter
from resafe.evals.safety.subjects import by_base
from resafe.evals.safety.text import uncalibrated
from resafe.evals.shared_base import SharedBase
from resafe.report import ModelInfo, Results, corrected, markdown_table, rich_table, summarise
from resafe.report import to_json as results_json
from resafe.report.results import About

if TYPE_CHECKING:
    from resafe.evals.utility import UtilityResult


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; printed, it is the table.

    Attributes:
        results: A row a model: rates, safety recovery, utility retention, over-refusal, with intervals.
        safety: Answers and the verdicts of every judge; None where no safety set was named.
        utility: lm-eval's figures, a result a model; empty where no task was named.
    """

    results: Results
    safety: SafetyResult | None
    utility: tuple[UtilityResult, ...]

    def __str__(self) -> str:
        """The table as text, 140 columns wide."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=140)
        console.print(rich_table(self.results))
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text

    def markdown(self) -> str:
        """The table as Markdown."""
        return markdown_table(self.results)

    def to_json(self) -> dict[str, Any]:
        """The results as JSON values."""
        return results_json(self.results)


def evaluate(
    models: Sequence[str | Path | Checkpoint | tuple[str, str | Path | Checkpoint]],
    *,
    safety: Sequence[str] = (),
    harmless: Sequence[str] = (),
    utility: Sequence[str] = (),
    utility_limit: int | Mapping[str, int] | None = None,
    judges: Sequence[str] = ("refusal",),
    data_dir: Path | str | None = None,
    out: Path | str | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Evaluation:
    """Measures models on safety, over-refusal and usefulness.

    The first model is the aligned one and the second the tuned one; the others are realigned. Recovery, retention and
    added over-refusal are of the first judge's refusals, paired by question.

    Args:
        models: References, opened checkpoints, or (name, one of these).
        safety: Sets of harmful questions.
        harmless: Sets of harmless questions; "xstest" is its safe half.
        utility: Tasks of lm-eval.
        utility_limit: First items of each task only, or a number by task.
        judges: Judges by name; the first must measure refusals, the others are in `Evaluation.safety`.
        data_dir: Directory of the public sets' files; None loads from the Hub.
        out: Directory for answers, verdicts, tables and Inspect's logs.
        reporter: Told what happens.
        settings: Other fields of `SafetySettings`: limit, max_new_tokens, dtype, device, system, wrappers, store, …;
            with `corrected` the table's rates of refusal are corrected for the judge's errors.

    Returns:
        The table and what it was made from.

    Raises:
        InputError: A model, a set, a task, a judge or a setting is wrong.
    """
    known = {name for name in SafetySettings.__dataclass_fields__}
    if set(settings) - known:
        raise InputError(f"no setting {sorted(set(settings) - known)}", f"the settings are: {', '.join(sorted(known))}")
    if not (safety or harmless or utility):
        raise InputError("nothing to measure was named", "give safety, harmless or utility")
    found = subjects(models)
    place = Path(data_dir) if data_dir is not None else None
    if utility and (served := [one.name for one in found if one.base is None]):
        raise InputError(f"{served[0]}: tasks are measured on local models only", "leave utility out")
    if (safety or harmless) and (measure := judge_named(judges[0]).traits["measures"]) != "refusal":
        raise InputError(f"the first judge, {judges[0]}, measures {measure}", "put refusal before it")
    if isinstance(settings.get("store"), str):
        settings["store"] = Path(settings["store"])
    answered = None
    if safety or harmless:
        asked = SafetySettings(
            sets=tuple(safety), harmless=tuple(harmless), judges=tuple(judges), data_dir=place, **settings
        )
        answered = evaluate_safety(found, asked, out=Path(out) if out is not None else None, reporter=reporter)
    used = _utility(found, list(utility), utility_limit, place, settings) if utility else ()
    return Evaluation(_summary(found, answered, used), answered, used)


def _summary(found: Sequence[Subject], answered: SafetyResult | None, used: Sequence[UtilityResult]) -> Results:
    names = [one.name for one in found]
    tuned = names[1] if len(names) > 1 else ""
    tasks = {record.set: tuned or names[0] for result in used for record in result.records}
    kinds = {
        name: ModelInfo(
            name, "aligned" if place == 0 else "tuned" if place == 1 else "realigned", aligned=names[0], tuned=tuned,
            tasks=tasks,
        )
        for place, name in enumerate(names)
    }  # fmt: skip
    records = [record for result in used for record in result.records]
    results = summarise([*_records(answered), *records], kinds, {}, **_about(answered))
    if answered is None or not answered.corrected:
        return results
    if answered.judges[0].errors is None:
        return replace(results, remarks=(uncalibrated(answered.judges[0], corrected=True),))
    return corrected(results)


def _about(answered: SafetyResult | None) -> About:
    """The first judge, and what is known of its agreement with people."""
    if answered is None:
        return {}
    named, first = answered.judges[0], answered.models[0]
    sides = [answer.side for answer in answered.answers if answer.model == first]
    return {
        "judge": f"Refusals are judged by {named.name}.",
        "calibration": report_json(named.calibration),
        "asked": {side: sides.count(side) for side in dict.fromkeys(sides)},
    }


def _records(answered: SafetyResult | None) -> list[Record]:
    """The first judge's verdicts in the outcomes of records; what is undetermined is no refusal.

    A question that is unscored for one model, as where an endpoint gave no answer, is left out for all.
    """
    if answered is None:
        return []
    verdicts = answered.verdicts[answered.judges[0].name]
    outcomes = {REFUSED: "refused", PARTIAL: "refused", BROKEN: "broken"}
    said = [outcomes.get(verdict.outcome, "answered") for verdict in verdicts]
    pairs = zip(answered.answers, verdicts, strict=True)
    lost = {(answer.label, answer.id) for answer, verdict in pairs if verdict.outcome == UNSCORED}
    return [
        Record(
            answer.model, answer.label, answer.side, answer.id, answer.prompt, answer.topic, None,
            answer.response or "", outcome, float(outcome == "refused"),
        )
        for answer, outcome in zip(answered.answers, said, strict=True)
        if (answer.label, answer.id) not in lost
    ]  # fmt: skip


def _utility(
    found: Sequence[Subject], tasks: list[str], limit: int | Mapping[str, int] | None, data_dir: Path | None,
    settings: Mapping[str, Any],
) -> tuple[UtilityResult, ...]:  # fmt: skip
    from resafe.checkpoints.precision import resolve_device
    from resafe.evals.utility import evaluate_utility

    device = str(resolve_device(settings.get("device", "auto")))
    results: dict[str, UtilityResult] = {}
    for group in by_base(found):
        base = group[0].base
        assert base is not None
        shared = SharedBase(base, dtype=settings.get("dtype", "auto"), device=device)
        for one in group:
            assert one.checkpoint is not None
            results[one.name] = evaluate_utility(
                one.name, shared.model(one.checkpoint), load_tokenizer(one.checkpoint), tasks, data_dir=data_dir,
                limit=limit,
            )  # fmt: skip
        shared.release()
    return tuple(results[one.name] for one in found)
