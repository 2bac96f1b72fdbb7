"""Results and records on disk: `results.json` (the summary) and `results.jsonl` (one record a line).

The same results give the same bytes: fixed key order, NaN as null, UTF-8, one newline at the end. Files are written
beside their place and renamed, so that a reader never meets half a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from resafe.errors import InputError
from resafe.evals.records import Record
from resafe.evals.statistics import Comparison, Interval
from resafe.files import write_whole
from resafe.report.results import SCHEMA_VERSION, Results, Row

_BY_NAME = ("harmful_by_set", "utility_by_task", "benchmarks", "benchmark_changes")
_LATER: dict[str, Any] = {
    "benchmarks": {},
    "benchmark_changes": {},
    "by_seed": {},
    "training_seeds": [],
    "calibration": {},
    "comparisons": [],
    "asked": {},
    "corrected": False,
    "remarks": [],
}
"""Fields that files written earlier lack, and what they stand for there."""


def to_json(results: Results) -> dict[str, Any]:
    """The results as JSON values: `rows` first, then what they were made with.

    An interval is `{"value", "low", "high", "n"}`; where it is undefined the three numbers are null and `reason` says
    why. `utility` is the mean over tasks, `utility_by_task` the tasks apart. Shares, not percentages.
    """
    document: dict[str, Any] = {"schema_version": results.schema_version, "rows": [_row(row) for row in results.rows]}
    for item in fields(Results):
        if item.name not in document:
            document[item.name] = _plain(getattr(results, item.name))
    return document


def dumps(results: Results) -> str:
    """`to_json` as text: indented, in a fixed order, ending in a newline."""
    return json.dumps(to_json(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _row(row: Row) -> dict[str, Any]:
    return {item.name: _plain(getattr(row, item.name)) for item in fields(Row)}


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value.to_json()
    if isinstance(value, Comparison):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(Comparison)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def from_json(document: Mapping[str, Any]) -> Results:
    """The results of `to_json`; raises `InputError` for another schema version or a missing field."""
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"results of schema version {version!r}, this resafe reads version {SCHEMA_VERSION}",
            "Evaluate again, or read them with the version of resafe that wrote them.",
        )
    try:
        values = {item.name: _field(document, item.name) for item in fields(Results)}
        values["training_seeds"] = tuple(values["training_seeds"])
        values["remarks"] = tuple(values["remarks"])
        values["comparisons"] = tuple(_comparison(one) for one in values["comparisons"])
        values["rows"] = tuple(_read_row(row) for row in document["rows"])
    except (KeyError, TypeError) as error:
        raise InputError(f"the results lack a field: {error}", "The file is damaged; evaluate again.") from error
    for name in ("seconds", "peak_memory_gb"):
        values[name] = _number(values[name])
    return Results(**values)


def _read_row(row: Mapping[str, Any]) -> Row:
    values = {item.name: _field(row, item.name) for item in fields(Row)}
    values["by_seed"] = {key: tuple(map(_number, found)) for key, found in values["by_seed"].items()}
    values["perplexity"] = _number(values["perplexity"])
    for name in _BY_NAME:
        values[name] = {key: _interval(item) for key, item in values[name].items()}
    for item in fields(Row):
        if item.type == "Interval":
            values[item.name] = _interval(values[item.name])
    return Row(**values)


def _field(values: Mapping[str, Any], name: str) -> Any:
    return values.get(name, _LATER[name]) if name in _LATER else values[name]


def _comparison(value: Mapping[str, Any]) -> Comparison:
    return Comparison(**{**value, "difference": _interval(value["difference"])})


def _interval(value: Mapping[str, Any]) -> Interval:
    low, high = _number(value["low"]), _number(value["high"])
    return Interval(_number(value["value"]), low, high, value["n"], value.get("reason", ""))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def write_results(path: Path, results: Results) -> None:
    """Write `results.json`."""
    _write(path, dumps(results))


def read_results(path: Path) -> Results:
    """Read `results.json`; raises `InputError` naming the file where it is missing or damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no results at {path}", "Run the recipe first: resafe run RECIPE.") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", "The file is damaged; evaluate again.") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} does not hold results", "Expected one JSON object.")
    try:
        return from_json(document)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", error.hint) from error


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write `results.jsonl`: one record a line, in the given order."""
    _write(path, "".join(f"{record.to_json()}\n" for record in records))


def read_records(path: Path) -> list[Record]:
    """Read `results.jsonl`; raises `InputError` naming the file and the line that is damaged."""
    if not path.is_file():
        raise InputError(f"no records at {path}", "Run the recipe first: resafe run RECIPE.")
    records: list[Record] = []
    # Split at newlines only: a response may hold other characters that Python takes for line ends.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            records.append(Record.from_json(line))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error.message}", error.hint) from error
    return records


def _write(path: Path, text: str) -> None:
    # A lone surrogate (a tokenizer's half character) cannot be UTF-8; show it as a replacement character.
    write_whole(path, text.encode("utf-8", errors="surrogatepass").decode("utf-8", errors="replace"))
