"""Rates of refusal corrected for the judge's errors (Rogan–Gladen), in place of the measured ones or beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from resafe.errors import InputError
from resafe.evals.statistics import Interval, JudgeErrors, corrected_rate
from resafe.report.notes import calibration_of
from resafe.report.results import Results, Row

SAID = (
    "Rates of refusal are corrected for the judge's errors (Rogan–Gladen), with limits that also count the labelled "
    "rows it was calibrated on; the other figures are as measured."
)
BESIDE = (
    "Measured → corrected for the judge's errors (Rogan–Gladen). The limits also count the labelled rows that the "
    "judge was calibrated on; the correction holds as far as the judge errs here as it did there. R_s, a ratio of "
    "differences, does not change."
)
REFUSALS = {
    "harmful refused": "harmful_refused",
    "harmless refused": "harmless_refused",
    "look-alike refused": "look_alike_refused",
    "plain refused": "plain_refused",
}
"""The rates that are corrected: title → field of `Row`."""


@dataclass(frozen=True)
class Correction:
    """What a page and a workbook show beside the measured rates.

    Attributes:
        rates: Model → title of the rate, in the order of `REFUSALS` → the corrected rate; empty where it cannot be.
        note: What the figures are, or why there are none and what to do.
    """

    note: str
    rates: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)

    @property
    def titles(self) -> list[str]:
        """The rates that any model has."""
        found = [title for title in REFUSALS if any(rates[title].defined for rates in self.rates.values())]
        return found if self.rates else []


def correction(results: Results) -> Correction:
    """The corrected rates of all rows, or the reason why there are none; never raises."""
    try:
        fixed = corrected(results)
    except InputError as error:
        return Correction(f"{error.message[0].upper()}{error.message[1:]} – {error.hint}.")
    rates = {row.model: {title: getattr(row, name) for title, name in REFUSALS.items()} for row in fixed.rows}
    return Correction(BESIDE, rates)


def corrected(results: Results) -> Results:
    """The results with all rates of refusal corrected for the judge's errors.

    R_s stays as it is: a ratio of differences does not change. Differences (added over-refusal) and rates of answers
    are left as measured.

    Raises:
        InputError: The results were made without a calibration of their judge, or over several training seeds.
    """
    errors = _errors(results)

    def fix(rate: Interval) -> Interval:
        return corrected_rate(rate, errors, results.confidence)

    def row(one: Row) -> Row:
        fixed: dict[str, Any] = {name: fix(getattr(one, name)) for name in REFUSALS.values()}
        fixed["harmful_by_set"] = {name: fix(rate) for name, rate in one.harmful_by_set.items()}
        return replace(one, **fixed)

    return replace(results, rows=tuple(map(row, results.rows)), corrected=True, remarks=(*results.remarks, SAID))


def _errors(results: Results) -> JudgeErrors:
    found = calibration_of(results)
    errors = found.best.overall.errors if found is not None else None
    if errors is None:
        raise InputError(
            "rates cannot be corrected: the results hold no calibration of their judge",
            "calibrate it (resafe judge calibrate refusal) and run the recipe again; finished stages are kept",
        )
    if results.training_seeds:
        raise InputError(
            "rates over several training seeds are not corrected: the limits would leave the seeds out",
            "each seed's own table, in the folders seed-N, can be",
        )
    return errors
