"""Reads the sets that `align` names, in any format of rows, and accounts for each row. Knows no models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resafe.data.intake import IntakeReport
from resafe.data.intake_sources import load_training
from resafe.data.items import Example, Pair
from resafe.training.lengths import only_fitting


@dataclass
class RowReader:
    """A reader for `load_material`: gives a set's items and keeps its report.

    Attributes:
        tokenizer: With a chat template.
        system: System turn of rows without one.
        max_tokens: Rows whose prompt alone is as long are "too long".
        data_dir: Directory with the files of registered sets.
        reports: What became of the rows, a report a set.
    """

    tokenizer: Any
    system: str | None
    max_tokens: int
    data_dir: Path | None
    reports: list[IntakeReport] = field(default_factory=list)

    def __call__(self, name: str, kind: str) -> Sequence[Example | Pair]:
        """The items of a set of that kind, see `load_training` for its names.

        Raises:
            InputError: There is no such set, or it holds no usable row.
        """
        data = load_training(name, kind, data_dir=self.data_dir, max_bad_share=1.0)
        self.reports.append(data.report)
        return only_fitting(data.items, self.tokenizer, self.system, self.max_tokens, [data.report])

    def check(self, most: float) -> None:
        """Raises InputError, with the rows' places, if the share of bad rows of a set is above `most`."""
        for report in self.reports:
            report.check(most)
