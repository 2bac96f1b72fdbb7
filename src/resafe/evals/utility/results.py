"""What an evaluation of utility hands back: scores as lm-eval gives them, items as records, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resafe.evals.records import Record
from resafe.files import write_whole


@dataclass(frozen=True)
class TaskScore:
    """One figure of one task.

    Attributes:
        model: The model's name.
        task: lm-eval's name of the task.
        metric: Such as "acc", "exact_match" or "pass@1".
        filter: lm-eval's filter, "none" where the task has one answer; GSM8K has strict-match and flexible-extract.
        value: As lm-eval computes it.
        stderr: Its standard error; None where lm-eval gives none.
        n: Items.
        fewshot: Worked examples in each prompt.
    """

    model: str
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    fewshot: int


@dataclass(frozen=True)
class UtilityResult:
    """All that was measured of one model.

    Attributes:
        model: The model's name.
        scores: Every metric of every task.
        records: One a task, filter and item, on side "task"; a task with several filters has a set for each.
        code: How programs ended, where any ran: passed, failed, timed_out, killed, and the protection they ran under.
        seconds: Wall time.
    """

    model: str
    scores: tuple[TaskScore, ...]
    records: tuple[Record, ...]
    code: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The figures without the items, as plain values."""
        return {
            "model": self.model,
            "scores": [asdict(score) for score in self.scores],
            "code": dict(self.code),
            "seconds": round(self.seconds, 2),
        }


def write_utility(out: Path, results: list[UtilityResult]) -> None:
    """Writes `utility.json` (the figures) and `records.jsonl` (a line an item) into a directory, in UTF-8."""
    figures = json.dumps([result.to_json() for result in results], indent=2, ensure_ascii=False)
    lines = [record.to_json() + "\n" for result in results for record in result.records]
    for name, text in (("records.jsonl", "".join(lines)), ("utility.json", figures + "\n")):
        write_whole(out / name, text)
