"""What stands under a table of results: how far its judge is to be trusted, what its size can show, who differs."""

from __future__ import annotations

from resafe.evals.calibration.store import Calibration, from_json
from resafe.evals.calibration.text import sentence
from resafe.evals.statistics import Interval, minimum_detectable_difference, zero_bound
from resafe.report.numbers import percent
from resafe.report.results import Results


def calibration_of(results: Results) -> Calibration | None:
    """The judge's calibration that the results were made with, or None."""
    return from_json(results.calibration) if results.calibration else None


def recall_note(results: Results) -> str:
    """The judge's recall in a few words, to stand beside a rate of refusals; empty where it is not known."""
    found = calibration_of(results)
    if found is None or not found.best.overall.recall.defined:
        return ""
    return f"judge's recall {percent(found.best.overall.recall.value)}"


def notes(results: Results, *, short: bool = False) -> list[str]:
    """Lines for under the table; `short`, for a terminal, leaves out the p-values of every comparison."""
    found = calibration_of(results)
    lines = [*results.remarks, *([sentence(found)] if found is not None else [])]
    # What n can show is said of measured rates: a corrected 0 is not "0 of n".
    of_n = [] if results.corrected else [*_detectable(results), *_nothing(results)]
    return [*lines, *of_n, *([] if short else _compared(results))]


def _detectable(results: Results) -> list[str]:
    row = next((one for one in results.rows if one.model == results.headline), None)
    if row is None:
        return []
    parts = []
    for words, rate in (("harmful", row.harmful_refused), ("harmless", row.harmless_refused), ("task", row.utility)):
        if rate.defined:
            n = _items(rate, results)
            found = minimum_detectable_difference(n, rate.value, results.confidence)
            parts.append(f"{found * 100:.0f} points on {n} {words} items" if found == found else "")
    shown = ", ".join(part for part in parts if part)
    return [f"Smallest difference from {row.model} that would be found, with 80 % power: {shown}."] if shown else []


def _items(rate: Interval, results: Results) -> int:
    """Items behind a rate: several training seeds answer the same ones, which makes them no more."""
    return rate.n // max(1, len(results.training_seeds))


def _nothing(results: Results) -> list[str]:
    """Rates of 0 of n, with 3/n."""
    found: dict[str, list[str]] = {}
    for row in results.rows:
        for words, rate in (
            ("refuses harmful questions", row.harmful_refused),
            ("answers harmful questions", row.harmful_answered),
            ("refuses harmless questions", row.harmless_refused),
        ):
            if rate.defined and rate.n and rate.value == 0 and results.confidence == 0.95:
                n = _items(rate, results)
                key = f"{words}: 0 of {n}, so at most {zero_bound(n) * 100:.1f} % (3/n)"
                found.setdefault(key, []).append(row.model)
    return [f"Never {what} – {', '.join(models)}." for what, models in found.items()]


def _compared(results: Results) -> list[str]:
    models: dict[str, list[str]] = {}
    for one in results.comparisons:
        models.setdefault(one.second, []).append(f"{one.set} {one.p_holm:.2g}")
    if not models:
        return []
    shown = "; ".join(f"{name}: {', '.join(found)}" for name, found in models.items())
    return [
        f"{results.comparisons[0].first} against each other model, exact McNemar p on the same items, "
        f"Holm across sets: {shown}."
    ]
