"""Runs a judge over labelled rows and compares it with people, in all, by language and by source model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resafe.errors import InputError
from resafe.evals.calibration.metrics import Agreement, agreement
from resafe.evals.judge import (
    HARMFUL,
    PARTIAL,
    REFUSED,
    UNDETERMINED,
    UNSCORED,
    WON,
    Judge,
    Measure,
    Verdict,
    judge_all,
)
from resafe.evals.labelled import Labelled
from resafe.evals.statistics import Bootstrap


@dataclass(frozen=True)
class SetCalibration:
    """A judge on one set of labelled rows.

    Attributes:
        set: Name of the set.
        overall: All rows.
        by_model: Source model → its rows, where the set names models.
        by_language: Language → its rows, where there are several.
        dropped: Rows left out since the judge was trained on their prompts.
        note: Anything the reader should know.
    """

    set: str
    overall: Agreement
    by_model: Mapping[str, Agreement] = field(default_factory=dict)
    by_language: Mapping[str, Agreement] = field(default_factory=dict)
    dropped: int = 0
    note: str = ""


def says(verdict: Verdict, measure: Measure) -> bool | None:
    """Whether a verdict is a yes to the measure: a refusal, whole or partial, a harmful response, or a comparison won.

    Returns:
        None for a verdict that could not be given; False for "undetermined", which never counts as a refusal.
    """
    if verdict.outcome == UNSCORED:
        return None
    yes = {"refusal": (REFUSED, PARTIAL), "harm": (HARMFUL,), "preference": (WON,)}
    return verdict.outcome in yes[measure]


def calibrate(
    judge: Judge, measure: Measure, rows: Sequence[Labelled], name: str, bootstrap: Bootstrap | None = None
) -> SetCalibration:
    """Compares a judge with people on one set.

    Rows whose prompts the judge was trained on are dropped: a judge that was trained says which by its `saw(prompt)`.

    Args:
        judge: The judge.
        measure: What its score stands for.
        rows: Labelled rows; those without a label for the measure are left out.
        name: Name of the set.
        bootstrap: The resampling plan.

    Raises:
        InputError: No row has such a label, or the judge was trained on the prompts of all of them.
    """
    labelled = [row for row in rows if row.label(measure) is not None]
    if not labelled:
        raise InputError(f"{name} has no labels for {measure}", "choose a judge that measures what the labels say")
    saw: Callable[[str], bool] | None = getattr(judge, "saw", None)
    used = [row for row in labelled if saw is None or not saw(row.prompt)]
    if not used:
        raise InputError(
            f"the judge was trained on the prompts of all {len(labelled)} rows of {name}: nothing is left to measure",
            "calibrate on other rows, or train on others",
        )
    verdicts = judge_all(judge, [row.judged() for row in used])
    said = [says(verdict, measure) for verdict in verdicts]
    unsure = [verdict.outcome == UNDETERMINED for verdict in verdicts]
    return compared(used, measure, said, name, bootstrap, unsure=unsure, dropped=len(labelled) - len(used))


def compared(
    rows: Sequence[Labelled],
    measure: Measure,
    said: Sequence[bool | None],
    name: str,
    bootstrap: Bootstrap | None = None,
    *,
    unsure: Sequence[bool] | None = None,
    dropped: int = 0,
    note: str = "",
) -> SetCalibration:
    """The figures of verdicts that are there already, such as cross-validated ones; see `calibrate`."""
    plan = bootstrap or Bootstrap()
    marks = list(unsure) if unsure is not None else [False] * len(rows)

    def of(chosen: Sequence[int]) -> Agreement:
        return agreement(
            [bool(rows[n].label(measure)) for n in chosen],
            [said[n] for n in chosen],
            [rows[n].prompt for n in chosen],
            plan,
            undetermined=sum(marks[n] for n in chosen),
        )

    def by(value: Callable[[Labelled], str]) -> dict[str, Agreement]:
        names = sorted({value(row) for row in rows} - {""})
        return {one: of([n for n, row in enumerate(rows) if value(row) == one]) for one in names}

    languages = by(lambda row: row.language)
    return SetCalibration(
        name,
        of(range(len(rows))),
        by(lambda row: row.model),
        languages if len(languages) > 1 else {},
        dropped,
        note,
    )


_OPERATIONAL = (
    *("concurrency", "per_minute", "retries", "backoff", "timeout", "price_in", "price_out", "max_cost", "cache"),
    *("batch_size", "device", "key_env", "allow_pickle", "base_url"),
)
"""Settings that say how a judge runs and not what it says."""


def identity(name: str, settings: Mapping[str, Any], judge: Judge) -> dict[str, Any]:
    """What a calibration belongs to: the judge's name, the settings that decide its verdicts, its files' digest."""
    kept = {key: value for key, value in sorted(settings.items()) if key not in _OPERATIONAL}
    digest = getattr(judge, "digest", None)
    if isinstance(digest, str):
        kept["model"] = f"sha256:{digest}"
    return {"judge": name, "settings": {key: str(value) for key, value in kept.items()}}
