"""Training in place: rows of several sets into one judge, with cross-validated figures of every head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resafe.errors import InputError
from resafe.evals.calibration import SetCalibration, compared
from resafe.evals.calibration.store import CROSS_VALIDATED
from resafe.evals.embedded.heads import FOLDS, LEAST, Head, cross_validated, fit_head
from resafe.evals.embedded.local import LocalModel
from resafe.evals.embedded.trained import TrainedJudge, prompts_of
from resafe.evals.judge import Measure
from resafe.evals.labelled import Labelled, without_prompts
from resafe.evals.statistics import Bootstrap

HEADS: tuple[Measure, ...] = ("refusal", "harm")


@dataclass(frozen=True)
class TrainingResult:
    """A trained judge and how it did on prompts that it had not seen.

    Attributes:
        judge: Trained on all rows.
        measured: Measure → figures by cross-validation, a part of the prompts held out at a time.
        auc: Measure → area under the curve of the held-out probabilities.
        dropped: Rows left out since their prompts are kept for calibrating.
    """

    judge: TrainedJudge
    measured: Mapping[Measure, tuple[SetCalibration, ...]]
    auc: Mapping[Measure, float]
    dropped: int


def train_judge(
    rows: Sequence[Labelled],
    *,
    keep_out: Collection[str] = (),
    local: LocalModel | None = None,
    bootstrap: Bootstrap | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> TrainingResult:
    """Trains a head for each measure that there are labels for.

    Args:
        rows: Labelled rows of one set or several.
        keep_out: `overlap_key` of prompts that the judge shall be calibrated on; rows with them are left out.
        local: A model whose hidden states the head for harm shall use too; refusals gain nothing from them.
        bootstrap: The resampling plan of the figures.
        say: Gets a line before each step.

    Raises:
        InputError: No measure has 20 rows of either label.
    """
    kept = without_prompts(rows, keep_out)
    heads: dict[Measure, Head] = {}
    measured: dict[Measure, tuple[SetCalibration, ...]] = {}
    auc: dict[Measure, float] = {}
    for measure in HEADS:
        labelled = [row for row in kept if row.label(measure) is not None]
        yes = sum(bool(row.label(measure)) for row in labelled)
        if min(yes, len(labelled) - yes) < LEAST:
            continue
        say(f"{measure}: {len(labelled)} rows, {len(prompts_of(labelled))} prompts, cross-validating in {FOLDS} parts")
        model = local if measure == "harm" else None
        states = _states(labelled, model, say)
        found = cross_validated(labelled, measure, local=model, states=states)
        auc[measure] = _auc(labelled, measure, found)
        measured[measure] = _by_set(labelled, measure, found, bootstrap)
        heads[measure] = fit_head(labelled, measure, local=model, states=states)
    if local is not None and "harm" not in heads:
        raise InputError(
            "a local model serves the judgement of harm, and the rows have too few labels for it",
            f"give at least {LEAST} harmful and {LEAST} harmless responses, or leave the model away",
        )
    if not heads:
        raise InputError(
            f"nothing can be learnt from {len(kept)} rows ({len(rows) - len(kept)} were kept out)",
            f"give at least {LEAST} refusals and {LEAST} answers, or {LEAST} harmful and {LEAST} harmless responses",
        )
    used = [row for row in kept if any(row.label(measure) is not None for measure in heads)]
    facts: dict[str, Any] = {
        "sets": sorted({row.set for row in used}),
        "rows": len(used),
        "auc": {name: round(value, 4) for name, value in auc.items()},
    }
    return TrainingResult(TrainedJudge(heads, prompts_of(used), facts), measured, auc, len(rows) - len(kept))


def _states(rows: Sequence[Labelled], model: LocalModel | None, say: Callable[[str], None]) -> Any:
    """The rows' hidden states, computed once for all parts; None without a model."""
    if model is None:
        return None
    say(f"running the first {model.layer} layers of {model.reference} over {len(rows)} responses")
    mark = 1

    def progress(done: int, asked: int) -> None:
        nonlocal mark
        if done * 10 >= asked * mark:
            say(f"  {done} of {asked}")
            mark = 1 + done * 10 // asked

    return model.states([row.judged() for row in rows], progress)


def _by_set(
    rows: Sequence[Labelled], measure: Measure, found: Any, bootstrap: Bootstrap | None
) -> tuple[SetCalibration, ...]:
    sets = dict.fromkeys(row.set for row in rows)
    return tuple(
        compared(
            [rows[n] for n in chosen],
            measure,
            [bool(found[n] >= 0.5) for n in chosen],
            name + CROSS_VALIDATED,
            bootstrap,
            note=f"by a judge trained on {FOLDS - 1} of {FOLDS} parts of the prompts, on the part held out",
        )
        for name in sets
        for chosen in [[n for n, row in enumerate(rows) if row.set == name]]
    )


def _auc(rows: Sequence[Labelled], measure: Measure, found: Any) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score([bool(row.label(measure)) for row in rows], found))
