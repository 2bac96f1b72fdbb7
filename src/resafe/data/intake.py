"""Rows in, items out, and every row that could not be used counted by its reason and named by its line.

Knows no files; stops a run whose data is worse than stated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from resafe.data.formats import RowError
from resafe.data.items import Example, Pair
from resafe.data.sources import Row
from resafe.data.streams import Unreadable
from resafe.errors import InputError, listed

NAMED = 20
"""Rows of each reason whose places are kept; the others are counted."""


@dataclass
class IntakeReport:
    """What became of the rows of a source.

    Attributes:
        source: The file, set or Hub id.
        rows: Rows read.
        kept: Items given.
        repeated: Rows equal to an earlier one.
        unused: Rows that the set's own rule leaves out (for example pairs with two safe answers).
        bad: Rows that cannot be used, by reason.
        named: For each reason, "place: detail" of the first rows.
        places: Where each item that was given came from, if `keep_places`.
        keep_places: Whether to keep those.
    """

    source: str
    rows: int = 0
    kept: int = 0
    repeated: int = 0
    unused: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    places: list[str] = field(default_factory=list, repr=False)
    keep_places: bool = False

    def reject(self, reason: str, place: str, detail: str) -> None:
        """Counts a bad row."""
        self.bad[reason] += 1
        places = self.named.setdefault(reason, [])
        if len(places) < NAMED:
            places.append(f"{place}: {detail}")

    @property
    def bad_share(self) -> float:
        """Bad rows as a share of all."""
        return self.bad.total() / self.rows if self.rows else 0.0

    def check(self, most: float) -> None:
        """Raises InputError, with the rows' places, if the share of bad rows is above `most` or nothing was kept."""
        lines = [line for places in self.named.values() for line in places]
        if not self.rows:
            raise InputError(f"{self.source} holds no rows", "give a file with data")
        if not self.kept:
            why = f"\n  {listed(lines, 3)}" if lines else ""
            raise InputError(
                f"{self.source}: none of its {self.rows} rows can be trained on{why}", "formats of rows: docs/data.md"
            )
        if self.bad_share > most:
            raise InputError(
                f"{self.source}: {self.bad.total()} of {self.rows} rows cannot be used ({self.summary()}), "
                f"more than the allowed share {most:g}\n  {listed(lines)}",
                "mend the rows (or raise max_tokens, if too long), or allow a larger share: --max-bad-share, "
                "in recipes max_bad_share",
            )

    def summary(self) -> str:
        """The bad rows by reason, in words: "3 empty, 1 unknown role"."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.bad.items())) or "none bad"

    def to_json(self) -> dict[str, Any]:
        """Plain values for files."""
        return {
            "source": self.source, "rows": self.rows, "kept": self.kept, "repeated": self.repeated,
            "unused": self.unused, "bad": dict(self.bad), "named": self.named,
        }  # fmt: skip


Parse = Callable[[Row], Example | Pair | None]


def take_in(rows: Iterable[Row | Unreadable], parse: Parse, report: IntakeReport) -> Iterator[Example | Pair]:
    """Items of rows, one at a time; what cannot be used goes into the report.

    An exact repetition of an earlier item is left out; to know them, the ids of all items are kept (about 120 bytes
    each, not the items).

    Args:
        rows: From a file or the Hub.
        parse: Gives the item of a row; None leaves the row out; RowError or InputError says what is wrong.
        report: Filled as the rows pass.
    """
    seen: set[bytes] = set()
    for row in rows:
        report.rows += 1
        if isinstance(row, Unreadable):
            report.reject("wrong schema", row.place, row.detail)
            continue
        try:
            item = parse(row)
        except RowError as error:
            report.reject(error.reason, row.place, error.detail)
            continue
        except InputError as error:  # from the parsers of registered sets: they name the place themselves
            reason = "empty" if error.message.endswith("is empty") else "wrong schema"
            report.reject(reason, row.place, error.message.removeprefix(f"{row.place}: "))
            continue
        if item is None:
            report.unused += 1
        elif (key := item.id.encode()) in seen:
            report.repeated += 1
        else:
            seen.add(key)
            report.kept += 1
            if report.keep_places:
                report.places.append(row.place)
            yield item
