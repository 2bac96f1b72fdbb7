"""The named sets of recipes and masks, with an account of each row: bad ones are counted, named, and few allowed.

The items and their ids are those of `load_set`, which stops at the first bad row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resafe.data.intake import IntakeReport, take_in
from resafe.data.intake_sources import MAX_BAD_SHARE, TrainingData
from resafe.data.items import Example, Pair
from resafe.data.registry import locate
from resafe.data.sources import Row, read_hub
from resafe.data.streams import Unreadable, stream_file


def load_counted(reference: str, kind: str, *, data_dir: Path | None = None) -> TrainingData:
    """Loads a registered set or a user's file, whatever is wrong with its rows; ask `report.check`.

    Args:
        reference: A registered name, its Hub id, or the path of a .jsonl, .json or .csv file.
        kind: "examples" or "pairs".
        data_dir: Directory with the files of registered sets; None loads them from the Hub.

    Raises:
        InputError: Unknown set, no such file, or it cannot be had.
    """
    source, file = locate(reference, data_dir=data_dir, kind=kind)
    # the Hub is not streamed: recipes read their sets again when they go on, and then find them in the cache
    hub = str(source.hub), source.config, source.split
    rows: Iterable[Row | Unreadable] = stream_file(file) if file is not None else read_hub(*hub)
    report = IntakeReport(reference)
    return TrainingData(tuple(take_in(rows, source.parse, report)), report)  # type: ignore[arg-type]


@dataclass
class CountingReader:
    """A reader for `load_material` that keeps the sets' reports.

    Attributes:
        data_dir: Directory with the files of registered sets.
        max_bad_share: Share of unusable rows of a set above which it is refused.
        reports: What became of the rows, a report a set.
    """

    data_dir: Path | None = None
    max_bad_share: float = MAX_BAD_SHARE
    reports: list[IntakeReport] = field(default_factory=list)

    def __call__(self, name: str, kind: str) -> tuple[Example | Pair, ...]:
        """The items of a set.

        Raises:
            InputError: There is no such set, none of its rows can be used, or too many cannot; names their lines.
        """
        data = load_counted(name, kind, data_dir=self.data_dir)
        data.report.check(self.max_bad_share)
        self.reports.append(data.report)
        return data.items

    def to_json(self) -> list[dict[str, Any]]:
        """The reports as plain values for files."""
        return [report.to_json() for report in self.reports]
