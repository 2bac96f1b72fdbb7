"""The table of a run over several training seeds: the answers of all of them pooled, and each seed's own figures.

All seeds' models answer the same items, so items and seeds are crossed; see `evals.statistics.Bootstrap`. With three
seeds the share of the seeds in an interval is itself known badly: read it beside the figures of each seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np

from resafe.errors import InputError
from resafe.evals.records import Record
from resafe.evals.statistics import Array
from resafe.report.results import (
    About,
    ItemScores,
    ModelInfo,
    Results,
    Row,
    check_roles,
    make_row,
    plan,
    with_rows,
)

_FIGURES = ("harmful_refused", "harmless_refused", "utility", "safety_recovery", "utility_retention")


class _Pooled:
    """The scores of several seeds, one after the other; `results.Scores`."""

    def __init__(self, seeds: Sequence[ItemScores]) -> None:
        self.seeds = seeds

    def items(self, model: str, group: str) -> list[Record]:
        return [record for scores in self.seeds for record in scores.items(model, group)]

    def share(self, model: str, group: str, outcome: str, topic: str = "") -> Array:
        return np.concatenate([scores.share(model, group, outcome, topic) for scores in self.seeds])

    def task(self, models: Sequence[str], task: str) -> list[Array]:
        each = [scores.task(models, task) for scores in self.seeds]
        return [np.concatenate(columns) for columns in zip(*each, strict=True)]


def summarise_seeds(
    records: Mapping[int, Sequence[Record]],
    kinds: Mapping[str, ModelInfo],
    perplexities: Sequence[Mapping[str, float]],
    **about: Unpack[About],
) -> Results:
    """Rows over several training seeds: means over items and seeds, with intervals that cover the choice of both.

    Args:
        records: Training seed → its records; every seed has the same models and items.
        kinds: Model name → its role.
        perplexities: For each seed, model name → perplexity; the row has their mean.
        about: As in `summarise`.

    Raises:
        InputError: As in `summarise`, or the seeds differ in their items.
    """
    check_roles(kinds, about.get("headline", ""))
    each = [ItemScores(own, kinds) for own in records.values()]
    _same_items(records)
    bootstrap = plan(about, blocks=len(each))
    single = plan({**about, "replicates": min(bootstrap.replicates, 200)})  # its limits are not shown
    rows = []
    for name, info in kinds.items():
        values = [one.get(name, math.nan) for one in perplexities]
        own = [make_row(info, scores, value, single) for scores, value in zip(each, values, strict=True)]
        pooled = make_row(info, _Pooled(each), sum(values) / len(values), bootstrap)
        rows.append(replace(pooled, by_seed=_by_seed(own)))
    return replace(with_rows(rows, next(iter(records.values()), ()), about), training_seeds=tuple(records))


def _by_seed(rows: Sequence[Row]) -> dict[str, tuple[float, ...]]:
    """Figure → its value for each seed; figures that no seed has are left out."""
    found = {name: tuple(getattr(row, name).value for row in rows) for name in _FIGURES}
    for name in rows[0].benchmarks:
        found[name] = tuple(row.benchmarks[name].value for row in rows)
    found["perplexity"] = tuple(row.perplexity for row in rows)
    return {name: values for name, values in found.items() if not all(math.isnan(value) for value in values)}


def _same_items(records: Mapping[int, Sequence[Record]]) -> None:
    keys = {seed: {(r.model, r.set, r.id) for r in own} for seed, own in records.items()}
    first, reference = next(iter(keys.items()), (0, set()))
    for seed, found in keys.items():
        if odd := sorted(found ^ reference):
            raise InputError(
                f"seeds {first} and {seed} were not judged on the same items ({len(odd)} differ: {'/'.join(odd[0])})",
                "Evaluate every seed on the same questions.",
            )
