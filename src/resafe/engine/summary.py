"""The first pass over one output file: the method's small summary of its tensors, kept in the staging directory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from resafe.engine.compute import Computer
from resafe.engine.layout import Unit
from resafe.engine.pool import in_order
from resafe.engine.spans import Span, tasks_of


def summary_path(stage: Path, round_: int, unit: Unit) -> Path:
    """Where the summary of a unit lies."""
    return stage / f"round-{round_}" / f"{unit.number}.safetensors"


def summarise_unit(computer: Computer, unit: Unit, round_: int, stage: Path, threads: int) -> None:
    """Stores the summary of a unit in a round of the first pass, unless it is there."""
    path = summary_path(stage, round_, unit)
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        _store(path, _summary(computer, unit, round_, threads))


def summaries(paths: Iterable[Path]) -> Iterator[Tensor]:
    """What is stored, in the order of the paths; a unit that no model changes has none."""
    stored = (load_file(path) for path in paths)
    return (found["summary"] for found in stored if found)


def _summary(computer: Computer, unit: Unit, round_: int, threads: int) -> Tensor | None:
    found: Tensor | None = None

    def work(task: list[Span]) -> Tensor | None:
        total = None
        for span in task:
            part = computer.summarise(span, round_)
            if part is not None:
                total = part if total is None else total + part
        return total

    for part in in_order(work, tasks_of(unit, False), threads):
        if part is not None:
            found = part if found is None else found + part
    return found


def _store(path: Path, summary: Tensor | None) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({} if summary is None else {"summary": summary.contiguous()}, partial)
    partial.replace(path)
