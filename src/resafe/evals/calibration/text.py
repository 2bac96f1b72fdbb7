"""Calibrations in words and as tables of text."""

from __future__ import annotations

from collections.abc import Sequence

from resafe.evals.calibration.metrics import MEASURES, Agreement
from resafe.evals.calibration.run import SetCalibration
from resafe.evals.calibration.store import Calibration
from resafe.evals.statistics import Interval


def sentence(calibration: Calibration) -> str:
    """What a report says of its judge, in one line."""
    found = calibration.best
    overall = found.overall
    return (
        f"The judge {calibration.judge} against people on {found.set} ({overall.n} responses): recall "
        f"{_percent(overall.recall)} %, specificity {_percent(overall.specificity)} %, κ {_plain(overall.kappa)}."
    )


def _percent(found: Interval) -> str:
    if not found.defined:
        return "–"
    return f"{found.value * 100:.0f} [{found.low * 100:.0f}–{found.high * 100:.0f}]"


def _plain(found: Interval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]" if found.defined else "–"


HEADS = ("rows", "n scored / asked", "yes", *MEASURES)


def table(sets: Sequence[SetCalibration]) -> list[list[str]]:
    """Rows of cells under `HEADS`: each set, then its languages and source models."""
    rows = []
    for found in sets:
        rows.append(_row(found.set, found.overall))
        for groups in (found.by_language, found.by_model):
            rows += [_row(f"  {name}", one) for name, one in groups.items()]
    return rows


def _row(name: str, found: Agreement) -> list[str]:
    share = f"{found.positives / found.n:.2f}" if found.n else "–"
    return [name, f"{found.n} / {found.asked}", share, *(_plain(getattr(found, one)) for one in MEASURES)]
