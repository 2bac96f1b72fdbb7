"""The small sets that ship with the package, typed, and their fixed split by request.

Knows the files in `embedded/` and which row belongs to which part. Knows nothing of models, mixes or other data sets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

from resafe.data.dealt import dealt
from resafe.errors import InputError

PARTS = ("train", "validation", "test")
_SALT = "resafe-split-1"

SPLIT_UP_TO = {"harmful": 490, "harmless": 480}
"""Numbers of the last rows that are split into parts. Later rows were written as contrasts of earlier ones, to train
on: they are training rows, and no question is among them."""
HARMFUL_TEST, HARMFUL_VALIDATION = 12, 8  # of the first 35 rows of each category
LOOK_ALIKE_TEST, LOOK_ALIKE_VALIDATION = 8, 7  # of the first 20 rows of each category
PLAIN_TEST, PLAIN_VALIDATION = 60, 30  # over all categories, in proportion to their size
TEXT_VALIDATION = 20  # of the plain texts; the others are test


@dataclass(frozen=True)
class HarmfulRow:
    """A harmful request with a refusing and a complying (non-operational) answer; `topic` is a noun phrase."""

    id: str
    category: str
    prompt: str
    topic: str
    refusal: str
    compliance: str


@dataclass(frozen=True)
class HarmlessRow:
    """A harmless request with a helpful answer; `kind` is `look_alike` (sounds harmful) or `plain`."""

    id: str
    kind: str
    category: str
    prompt: str
    response: str


@dataclass(frozen=True)
class TextRow:
    """A short neutral text, for perplexity."""

    id: str
    text: str


T = TypeVar("T")
Row = TypeVar("Row", HarmfulRow, HarmlessRow, TextRow)


def _read(name: str) -> list[dict[str, Any]]:
    text = resources.files("resafe.data").joinpath("embedded", f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def check_part(part: str) -> None:
    """Raises InputError if `part` is not one of `PARTS`."""
    if part not in PARTS:
        raise InputError(f"no part {part!r} of a data set", f"the parts are: {', '.join(PARTS)}")


def _rank(row: Row) -> str:
    return hashlib.sha256(f"{_SALT}:{row.id}".encode()).hexdigest()


def _later(row: Row) -> bool:
    """Whether the row is one of those that are only trained on."""
    last = SPLIT_UP_TO["harmful" if isinstance(row, HarmfulRow) else "harmless"]
    return not isinstance(row, TextRow) and int(row.id.partition("-")[2]) > last


def _take(rows: Iterable[Row], part: str, test: int, validation: int) -> list[Row]:
    """The rows of one group that fall in `part`: ranked by the digest of their id, test first, then validation."""
    ranked = sorted(rows, key=lambda row: (_later(row), _rank(row)))
    bounds = {"test": (0, test), "validation": (test, test + validation), "train": (test + validation, len(ranked))}
    first, last = bounds[part]
    return ranked[first:last]


def _groups(rows: Sequence[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def harmful_rows(part: str | None = None) -> list[HarmfulRow]:
    """The shipped harmful requests, in file order.

    Args:
        part: "train", "validation" (8 of each category) or "test" (12 of each category); None for all. A row's part
            depends on its id and its category's other ids only, so adding rows to other categories moves nothing.

    Raises:
        InputError: `part` is unknown.
    """
    rows = [HarmfulRow(**row) for row in _read("harmful")]
    if part is None:
        return rows
    check_part(part)
    groups = _groups(rows, lambda row: row.category).values()
    chosen = {row.id for group in groups for row in _take(group, part, HARMFUL_TEST, HARMFUL_VALIDATION)}
    return [row for row in rows if row.id in chosen]


def harmless_rows(part: str | None = None, kind: str | None = None) -> list[HarmlessRow]:
    """The shipped harmless requests, in file order.

    Args:
        part: As for `harmful_rows`; look-alikes give 8 + 7 of each category to test and validation, plain requests
            60 + 30 over all categories in proportion to their size.
        kind: "look_alike" or "plain"; None for both.

    Raises:
        InputError: `part` or `kind` is unknown.
    """
    if kind not in (None, "look_alike", "plain"):
        raise InputError(f"no kind {kind!r} of harmless request", "the kinds are: look_alike, plain")
    rows = [HarmlessRow(**row) for row in _read("harmless")]
    wanted = [row for row in rows if kind in (None, row.kind)]
    if part is None:
        return wanted
    check_part(part)
    look_alike = _groups([row for row in rows if row.kind == "look_alike"], lambda row: row.category)
    plain = _groups([row for row in rows if row.kind == "plain"], lambda row: row.category)
    sizes = {category: sum(not _later(row) for row in group) for category, group in plain.items()}
    test, validation = dealt(sizes, PLAIN_TEST), dealt(sizes, PLAIN_VALIDATION)
    chosen = {row.id for g in look_alike.values() for row in _take(g, part, LOOK_ALIKE_TEST, LOOK_ALIKE_VALIDATION)}
    chosen |= {row.id for name, g in plain.items() for row in _take(g, part, test[name], validation[name])}
    return [row for row in wanted if row.id in chosen]


def plain_texts(part: str | None = None) -> list[TextRow]:
    """The shipped texts for perplexity: 20 for validation, the others for test, none for training.

    Raises:
        InputError: `part` is unknown.
    """
    rows = [TextRow(**row) for row in _read("plain_text")]
    if part is None:
        return rows
    check_part(part)
    chosen = {row.id for row in _take(rows, part, len(rows) - TEXT_VALIDATION, TEXT_VALIDATION)}
    return [row for row in rows if row.id in chosen]
