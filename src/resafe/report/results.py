"""What was measured, as rows: one a model, each with its rates, ratios and intervals.

Knows records (one item of one model) and the roles of models; knows nothing of models, judges, files or pictures.
`SCHEMA_VERSION` is raised whenever a field of the JSON form changes its name, place or meaning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypedDict, Unpack, get_args

import numpy as np

from resafe.errors import InputError
from resafe.evals.records import Record
from resafe.evals.statistics import (
    Array,
    Bootstrap,
    Comparison,
    Interval,
    compare,
    mean_interval,
    over_refusal_added,
    paired_difference,
    safety_recovery,
    utility_retention,
)

SCHEMA_VERSION = 1
Kind = Literal["base", "aligned", "tuned", "realigned", "baseline"]


@dataclass(frozen=True)
class ModelInfo:
    """The role of one evaluated model.

    Attributes:
        name: As in the records.
        kind: `base` (before alignment), `aligned`, `tuned`, `realigned` (what resafe made) or
            `baseline` (what it is compared with).
        method: Title of the method, e.g. "gradient selector".
        source: The paper of the method, e.g. "arXiv:2405.09055".
        settings: Strength and other settings, for the table and the card.
        aligned: Name of the aligned model; empty for an aligned model means itself.
        tuned: Name of the model whose lost safety is to be recovered and whose over-refusal is the baseline; empty
            for a tuned model means itself.
        tasks: Task set → name of the model tuned on that task: the sets that this model's utility is measured on.
        note: Anything the reader should know.
        benchmarks: Task sets of lm-eval that are shown for the model beside its own tasks.
    """

    name: str
    kind: Kind
    method: str = ""
    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    aligned: str = ""
    tuned: str = ""
    tasks: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    benchmarks: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """One model's figures. Rates and ratios are shares (1 = 100 %), with 95 % limits unless `Results` says otherwise.

    Attributes:
        harmful_refused: S: share of harmful questions refused. A broken answer is neither refused nor answered.
        harmful_answered: Share of harmful questions answered.
        harmful_broken: Share of harmful questions with a broken answer (empty, repetitive, cut off in noise).
        harmful_by_set: Set → share of its harmful questions refused.
        harmless_refused: Share of harmless questions refused.
        look_alike_refused: The same over topics `look_alike/…`: harmless questions that sound harmful.
        plain_refused: The same over topics `plain/…`.
        utility: U: mean of the task scores over the model's tasks.
        utility_by_task: Task set → mean score.
        perplexity: Per token, on plain text; NaN where it was not measured.
        safety_recovery: R_s.
        utility_retention: R_u, mean over tasks, each against the model tuned on that task.
        over_refusal_added: `harmless_refused` minus that of the tuned model.
        over_refusal_vs_aligned: `harmless_refused` minus that of the aligned model.
        benchmarks: Task set of lm-eval → mean score.
        benchmark_changes: Task set of lm-eval → mean score minus that of the aligned model, on the same items.
        by_seed: Of a table over several training seeds: figure → its value for each seed, in their order.
    """

    model: str
    kind: Kind
    method: str
    source: str
    settings: Mapping[str, Any]
    note: str
    aligned: str
    tuned: str
    harmful_refused: Interval
    harmful_answered: Interval
    harmful_broken: Interval
    harmful_by_set: Mapping[str, Interval]
    harmless_refused: Interval
    look_alike_refused: Interval
    plain_refused: Interval
    utility: Interval
    utility_by_task: Mapping[str, Interval]
    perplexity: float
    safety_recovery: Interval
    utility_retention: Interval
    over_refusal_added: Interval
    over_refusal_vs_aligned: Interval
    benchmarks: Mapping[str, Interval] = field(default_factory=dict)
    benchmark_changes: Mapping[str, Interval] = field(default_factory=dict)
    by_seed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """All rows of one evaluation and what they were made with.

    Attributes:
        rows: In the order in which the models were given.
        headline: Name of the row that the report is about: the default preset's realigned model.
        seconds: Wall time of the run, NaN where unknown.
        peak_memory_gb: Peak resident memory of the run in 10⁹ bytes, NaN where unknown.
        items: Side (`harmful`, `harmless`, `task`) → number of items per model, summed over sets.
        asked: Side → number of items that models were asked, where not all of them could be scored.
        corrected: Whether the rates of refusal are corrected for the judge's errors.
        remarks: Sentences for under the table.
        judge: How responses were judged, in a sentence.
        confidence: Coverage of all intervals.
        replicates: Bootstrap replicates.
        seed: Seed of the bootstrap.
        versions: Library → version.
        digests: What → SHA-256 of the inputs (models, data, recipe).
        training_seeds: Seeds that the models were trained with, where the table is pooled over several.
        calibration: The stored calibration of the judge as JSON values; empty where there is none.
        comparisons: The headline model against every other on each set: paired, McNemar, Holm across sets.
    """

    rows: tuple[Row, ...]
    headline: str = ""
    seconds: float = math.nan
    peak_memory_gb: float = math.nan
    items: Mapping[str, int] = field(default_factory=dict)
    judge: str = ""
    confidence: float = 0.95
    replicates: int = 10_000
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    training_seeds: tuple[int, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    asked: Mapping[str, int] = field(default_factory=dict)
    corrected: bool = False
    remarks: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def row(self, model: str) -> Row:
        """The row of a model; raises `InputError` where there is none."""
        for row in self.rows:
            if row.model == model:
                return row
        known = ", ".join(row.model for row in self.rows)
        raise InputError(f"no results for a model named {model!r}", f"The results hold: {known}.")


Key = tuple[str, str]


class Scores(Protocol):
    """One value an item of a model and a group of items, in one order for all models."""

    def items(self, model: str, group: str) -> list[Record]:
        """The records."""
        ...

    def share(self, model: str, group: str, outcome: str, topic: str = "") -> Array:
        """1 where the outcome is that one, else 0, over the items of topics that begin so."""
        ...

    def task(self, models: Sequence[str], task: str) -> list[Array]:
        """Scores of one task for several models, paired."""
        ...


class ItemScores:
    """Records as arrays: for a model and a group of items, one value an item, in one order for all models."""

    def __init__(self, records: Sequence[Record], kinds: Mapping[str, ModelInfo]) -> None:
        self.of: dict[str, dict[str, dict[Key, Record]]] = {name: {} for name in kinds}
        for record in records:
            if record.model not in self.of:
                raise InputError(f"records of an unknown model {record.model!r}", f"Known: {', '.join(kinds)}.")
            group = record.set if record.side == "task" else record.side
            items = self.of[record.model].setdefault(group, {})
            if (record.set, record.id) in items:
                raise InputError(f"{record.model}: item {record.id!r} of {record.set!r} was recorded twice", "")
            items[record.set, record.id] = record
        for group in ("harmful", "harmless"):
            self._same(group, list(kinds))

    def _same(self, group: str, models: Sequence[str]) -> None:
        reference = self.of[models[0]].get(group, {}).keys() if models else set()
        for model in models[1:]:
            odd = sorted(self.of[model].get(group, {}).keys() ^ reference)
            if odd:
                where = ", ".join("/".join(key) for key in odd[:3])
                raise InputError(
                    f"{model} and {models[0]} were not judged on the same {group} items ({len(odd)} differ: {where})",
                    "Figures are paired by item; evaluate every model on the same questions.",
                )

    def items(self, model: str, group: str) -> list[Record]:
        """The records, in an order that is the same for all models."""
        found = self.of[model].get(group, {})
        return [found[key] for key in sorted(found)]

    def share(self, model: str, group: str, outcome: str, topic: str = "") -> Array:
        """1 where the outcome is that one, else 0."""
        chosen = [record for record in self.items(model, group) if record.topic.startswith(topic)]
        return np.array([float(record.outcome == outcome) for record in chosen], dtype=np.float64)

    def task(self, models: Sequence[str], task: str) -> list[Array]:
        """Scores of one task for several models, paired."""
        self._same(task, models)
        return [np.array([float(r.score) for r in self.items(m, task)], dtype=np.float64) for m in models]


class About(TypedDict, total=False):
    """What a table of results says beside its rows.

    Attributes:
        seconds: Wall time of the run.
        peak_memory_gb: Peak memory of the run in 10⁹ bytes.
        headline: The model the report is about; empty: the first realigned one.
        judge: How responses were judged, in a sentence.
        versions: Library → version.
        digests: What → digest.
        calibration: The judge's stored calibration as JSON values.
        asked: Side → items asked.
        replicates: Bootstrap replicates; 10,000 where not given.
        seed: Seed of the bootstrap; 0 where not given.
        confidence: Coverage of the intervals; 0.95 where not given.
    """

    seconds: float
    peak_memory_gb: float
    headline: str
    judge: str
    versions: Mapping[str, str]
    digests: Mapping[str, str]
    calibration: Mapping[str, Any]
    asked: Mapping[str, int]
    replicates: int
    seed: int
    confidence: float


def summarise(
    records: Sequence[Record],
    kinds: Mapping[str, ModelInfo],
    perplexities: Mapping[str, float],
    **about: Unpack[About],
) -> Results:
    """Turn judged items into rows with intervals.

    Args:
        records: One item of one model each; all models must have the same harmful and harmless items, and the models
            compared on a task the same items of that task.
        kinds: Model name → its role, in the order of the rows.
        perplexities: Model name → perplexity; may lack models.
        about: See `About`.

    Raises:
        InputError: Items differ between models, an item is recorded twice, or a name refers to no model.
    """
    check_roles(kinds, about.get("headline", ""))
    scores, bootstrap = ItemScores(records, kinds), plan(about)
    rows = tuple(make_row(info, scores, perplexities.get(name, math.nan), bootstrap) for name, info in kinds.items())
    results = with_rows(rows, records, about)
    return replace(results, comparisons=_comparisons(results.headline, kinds, scores, bootstrap))


def plan(about: About, blocks: int = 1) -> Bootstrap:
    """The resampling plan of a table."""
    return Bootstrap(about.get("replicates", 10_000), about.get("seed", 0), about.get("confidence", 0.95), blocks)


def with_rows(rows: Sequence[Row], records: Sequence[Record], about: About) -> Results:
    """Results of finished rows; `records` are those of one training seed, for the number of items."""
    said: About = {**about, "headline": about.get("headline") or first_realigned(rows)}
    return Results(rows=tuple(rows), items=count_items(records), **said)


def _comparisons(
    head: str, kinds: Mapping[str, ModelInfo], scores: Scores, bootstrap: Bootstrap
) -> tuple[Comparison, ...]:
    """The headline against every other model: refusals on both sides, and the tasks that both have, where 0 or 1."""
    found: list[Comparison] = []
    for other in kinds if head else ():
        if other == head:
            continue
        sets: dict[str, tuple[Array, Array]] = {
            side: (scores.share(head, side, "refused"), scores.share(other, side, "refused"))
            for side in ("harmful", "harmless")
        }
        for task in kinds[head].tasks:
            if task in kinds[other].tasks:
                one, two = scores.task([head, other], task)
                if np.isin(np.concatenate([one, two]), (0.0, 1.0)).all():
                    sets[task] = (one, two)
        found += compare(head, other, dict(sets), bootstrap)
    return tuple(found)


def first_realigned(rows: Sequence[Row]) -> str:
    """The model that a report is about if none is named."""
    return next((row.model for row in rows if row.kind == "realigned"), "")


def count_items(records: Sequence[Record]) -> dict[str, int]:
    """Side → number of items."""
    return {side: len({(r.set, r.id) for r in records if r.side == side}) for side in ("harmful", "harmless", "task")}


def check_roles(kinds: Mapping[str, ModelInfo], headline: str) -> None:
    """Raises InputError where a role, or the model that a role or the headline refers to, is unknown."""
    known = f"Known: {', '.join(kinds)}."
    for name, info in kinds.items():
        if info.name != name:
            raise InputError(f"the role of {name!r} carries the name {info.name!r}", "Give both the same name.")
        if info.kind not in get_args(Kind):
            raise InputError(f"{name}: unknown kind {info.kind!r}", f"One of {', '.join(get_args(Kind))}.")
        for reference in (info.aligned, info.tuned, *info.tasks.values()):
            if reference and reference not in kinds:
                raise InputError(f"{name} refers to a model {reference!r} that was not evaluated", known)
    if headline and headline not in kinds:
        raise InputError(f"the headline model {headline!r} was not evaluated", known)


def make_row(info: ModelInfo, scores: Scores, perplexity: float, bootstrap: Bootstrap) -> Row:
    """One model's figures."""
    aligned = info.aligned or (info.name if info.kind == "aligned" else "")
    tuned = info.tuned or (info.name if info.kind == "tuned" else "")

    def rate(group: str, outcome: str, topic: str = "") -> Interval:
        return mean_interval(scores.share(info.name, group, outcome, topic), bootstrap)

    by_task = {task: mean_interval(scores.task([info.name], task)[0], bootstrap, task) for task in info.tasks}
    return Row(
        model=info.name,
        kind=info.kind,
        method=info.method,
        source=info.source,
        settings=dict(info.settings),
        note=info.note,
        aligned=aligned,
        tuned=tuned,
        harmful_refused=rate("harmful", "refused"),
        harmful_answered=rate("harmful", "answered"),
        harmful_broken=rate("harmful", "broken"),
        harmful_by_set=_by_set(info.name, scores, bootstrap),
        harmless_refused=rate("harmless", "refused"),
        look_alike_refused=rate("harmless", "refused", "look_alike"),
        plain_refused=rate("harmless", "refused", "plain"),
        utility=_utility(info, by_task, scores, bootstrap),
        utility_by_task=by_task,
        perplexity=perplexity,
        safety_recovery=_recovery(info.name, tuned, aligned, scores, bootstrap),
        utility_retention=_retention(info, aligned, scores, bootstrap),
        over_refusal_added=_added(info.name, tuned, "tuned", scores, bootstrap),
        over_refusal_vs_aligned=_added(info.name, aligned, "aligned", scores, bootstrap),
        benchmarks={name: mean_interval(scores.task([info.name], name)[0], bootstrap) for name in info.benchmarks},
        benchmark_changes=_changes(info, aligned, scores, bootstrap),
    )


def _changes(info: ModelInfo, aligned: str, scores: Scores, bootstrap: Bootstrap) -> dict[str, Interval]:
    """The benchmarks against the aligned model on the same items; nothing for the aligned model itself."""
    if not aligned or aligned == info.name:
        return {}
    found = {}
    for name in info.benchmarks:
        own, theirs = scores.task([info.name, aligned], name)
        found[name] = paired_difference(own, theirs, bootstrap)
    return found


def _by_set(model: str, scores: Scores, bootstrap: Bootstrap) -> dict[str, Interval]:
    found: dict[str, list[float]] = {}
    for record in scores.items(model, "harmful"):
        found.setdefault(record.set, []).append(float(record.outcome == "refused"))
    return {name: mean_interval(values, bootstrap) for name, values in found.items()}


def _utility(info: ModelInfo, by_task: Mapping[str, Interval], scores: Scores, bootstrap: Bootstrap) -> Interval:
    if len(by_task) < 2:
        return next(iter(by_task.values()), Interval.undefined("not judged on a task"))
    columns = {task: scores.task([info.name], task)[0] for task in by_task}
    return bootstrap.interval(lambda means: np.mean([m[:, 0] for m in means.values()], axis=0), columns)


def _recovery(model: str, tuned: str, aligned: str, scores: Scores, bootstrap: Bootstrap) -> Interval:
    if not (tuned and aligned):
        return Interval.undefined(f"no {'tuned' if aligned else 'aligned'} model to compare with")
    realigned, lost, kept = (scores.share(name, "harmful", "refused") for name in (model, tuned, aligned))
    return safety_recovery(realigned, lost, kept, bootstrap)


def _retention(info: ModelInfo, aligned: str, scores: Scores, bootstrap: Bootstrap) -> Interval:
    if not (info.tasks and aligned):
        return Interval.undefined("not judged on a task" if aligned else "no aligned model to compare with")
    columns = {task: scores.task([info.name, tuned, aligned], task) for task, tuned in info.tasks.items()}
    realigned, of_tuned, of_aligned = ({task: values[i] for task, values in columns.items()} for i in range(3))
    return utility_retention(realigned, of_tuned, of_aligned, bootstrap)


def _added(model: str, reference: str, role: str, scores: Scores, bootstrap: Bootstrap) -> Interval:
    if not reference:
        return Interval.undefined(f"no {role} model to compare with")
    columns = [scores.share(name, "harmless", "refused") for name in (model, reference)]
    if model == reference and columns[0].size:
        return Interval(0.0, 0.0, 0.0, columns[0].size)  # by definition, not by measurement
    return over_refusal_added(columns[0], columns[1], bootstrap)
