"""Calibrations on disk: one JSON file a judge (name and settings), numbers only; a few come with the package."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from resafe.cachedir import cache_root
from resafe.errors import InputError
from resafe.evals.calibration.metrics import MEASURES, Agreement
from resafe.evals.calibration.run import SetCalibration
from resafe.evals.judge import Measure
from resafe.evals.statistics import Interval
from resafe.files import write_whole
from resafe.provenance import digest_value

FORMAT = 1
CROSS_VALIDATED = ", cross-validated"
"""How the name of a set ends whose figures are from training, by cross-validation."""
PREFERRED: Mapping[str, tuple[str, ...]] = {"refusal": ("xstest", "pyrit"), "harm": ("beavertails", "saferlhf")}
"""Published sets in the order in which a report takes them; a user's own rows go before them."""


@dataclass(frozen=True)
class Calibration:
    """A judge against people on one set or more.

    Attributes:
        judge: Its name.
        settings: The settings that decide its verdicts.
        measure: What its score stands for.
        sets: Name of the set → the figures.
    """

    judge: str
    settings: Mapping[str, str]
    measure: Measure
    sets: Mapping[str, SetCalibration]

    @property
    def best(self) -> SetCalibration:
        """The set that stands for the judge in reports: a user's own rows, else the first published set there is."""
        preferred = PREFERRED.get(self.measure, ())
        known = [name for name in preferred if name in self.sets]
        own = [name for name in self.sets if name not in preferred and not name.endswith(CROSS_VALIDATED)]
        return self.sets[(own or known or list(self.sets))[0]]


def to_json(calibration: Calibration) -> dict[str, Any]:
    """Plain values; an undefined figure is null with its reason."""
    return {
        "format": FORMAT,
        "judge": calibration.judge,
        "settings": dict(calibration.settings),
        "measure": calibration.measure,
        "sets": {name: _set_json(found) for name, found in calibration.sets.items()},
    }


def report_json(calibration: Calibration | None) -> dict[str, Any]:
    """What a report keeps of its judge: the set that stands for it, as plain values; empty where nothing is known."""
    if calibration is None:
        return {}
    known = calibration
    return to_json(merged(known.judge, known.settings, known.measure, [known.best]))


def _set_json(found: SetCalibration) -> dict[str, Any]:
    values: dict[str, Any] = {"overall": _agreement_json(found.overall), "dropped": found.dropped, "note": found.note}
    for name in ("by_model", "by_language"):
        values[name] = {key: _agreement_json(one) for key, one in getattr(found, name).items()}
    return values


def _agreement_json(found: Agreement) -> dict[str, Any]:
    values = {item.name: getattr(found, item.name) for item in fields(Agreement)}
    for name in MEASURES:
        interval = values[name]
        shown = {key: _rounded(getattr(interval, key)) for key in ("value", "low", "high")}
        values[name] = shown | ({"reason": interval.reason} if interval.reason else {})
    return values | {key: _rounded(values[key]) for key in ("recall_n", "specificity_n")}


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def from_json(document: Any) -> Calibration:
    """What `to_json` made.

    Raises:
        InputError: It is something else, or of another format.
    """
    try:
        if document["format"] != FORMAT:
            raise InputError(f"a calibration of format {document['format']!r}", "calibrate again")
        sets = {name: _read_set(name, values) for name, values in document["sets"].items()}
        return Calibration(document["judge"], document["settings"], document["measure"], sets)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"this is no calibration: {error!r}", "calibrate again") from error


def _read_set(name: str, values: Mapping[str, Any]) -> SetCalibration:
    groups = {key: {k: _read_agreement(v) for k, v in values[key].items()} for key in ("by_model", "by_language")}
    return SetCalibration(
        name, _read_agreement(values["overall"]), dropped=values["dropped"], note=values["note"], **groups
    )


def _read_agreement(values: Mapping[str, Any]) -> Agreement:
    found = {item.name: values[item.name] for item in fields(Agreement)}
    for name in MEASURES:
        low, value, high = (math.nan if found[name][k] is None else found[name][k] for k in ("low", "value", "high"))
        found[name] = Interval(value, low, high, values["n"], found[name].get("reason", ""))
    return Agreement(**found)


def calibrations_root() -> Path:
    """Where calibrations are kept."""
    return cache_root() / "calibrations"


def place_of(judge: str, settings: Mapping[str, str]) -> Path:
    """The file of a judge's calibration in the cache."""
    short = f"-{digest_value(dict(settings))[:12]}" if settings else ""
    return calibrations_root() / f"{judge}{short}.json"


def read_calibration(path: Path) -> Calibration:
    """Reads a file.

    Raises:
        InputError: No such file, or no calibration in it.
    """
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"no calibration at {path}", "make one: resafe judge calibrate") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", "calibrate again") from error
    except InputError as error:
        raise InputError(f"{path}: {error.message}", error.hint) from error


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Writes a file, whole or not at all."""
    text = json.dumps(to_json(calibration), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")


def remember(calibration: Calibration) -> Path:
    """Keeps a calibration in the cache, beside the sets that the same judge was measured on before."""
    path = place_of(calibration.judge, calibration.settings)
    known = _readable(path)
    merged = {**known.sets, **calibration.sets} if known is not None else calibration.sets
    write_calibration(path, Calibration(calibration.judge, calibration.settings, calibration.measure, merged))
    return path


def stored_calibration(judge: str, settings: Mapping[str, str] | None = None) -> Calibration | None:
    """The calibration of a judge with these settings: the cache's, else the one that comes with the package."""
    found = _readable(place_of(judge, settings or {}))
    if found is None and not settings:
        shipped = resources.files("resafe.evals.calibration") / "shipped" / f"{judge}.json"
        if shipped.is_file():
            found = from_json(json.loads(shipped.read_text(encoding="utf-8")))
    return found


def _readable(path: Path) -> Calibration | None:
    """What is there, or None: a damaged file of the cache is as good as none, and written anew by `remember`."""
    try:
        return read_calibration(path)
    except InputError:
        return None


def merged(judge: str, settings: Mapping[str, str], measure: Measure, sets: Iterable[SetCalibration]) -> Calibration:
    """A calibration of sets in their order."""
    return Calibration(judge, settings, measure, {found.set: found for found in sets})
