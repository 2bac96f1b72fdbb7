"""How a plan's tensors are cut into work for threads: tasks of about equal size, each a few spans of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from resafe.engine.layout import Placed, Unit
from resafe.engine.sources import rows_of

PIECE = 1 << 17
"""Entries that are computed at once: float32 copies of a few models' pieces fit a core's cache."""
SUMMARISED = 1 << 19
"""Entries that are summarised at once: a histogram has more bins than a piece would fill."""
ON_DEVICE = 1 << 22
"""Entries that a GPU computes at once: starting its kernels costs more than a small piece."""
_TASK = 1 << 23


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of one tensor."""

    tensor: Placed
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Entries."""
        return (self.stop - self.start) * rows_of(self.tensor.shape)[1]

    def pieces(self, size: int = PIECE) -> Iterator[Span]:
        """The span in pieces of at most `size` entries, whole rows each."""
        step = max(1, size // max(1, rows_of(self.tensor.shape)[1]))
        for start in range(self.start, self.stop, max(1, step)):
            yield Span(self.tensor, start, min(self.stop, start + step))


def tasks_of(unit: Unit, undivided: bool) -> list[list[Span]]:
    """The tensors of a unit as tasks of about 2²³ entries; `undivided` never cuts a fused tensor."""
    tasks: list[list[Span]] = [[]]
    filled = 0
    for tensor in unit.tensors:
        rows, width = rows_of(tensor.shape)
        step = rows if undivided and tensor.fused else max(1, _TASK // max(1, width))
        for start in range(0, rows, max(1, step)):
            span = Span(tensor, start, min(rows, start + step))
            if tasks[-1] and filled + span.numel > _TASK:
                tasks.append([])
                filled = 0
            tasks[-1].append(span)
            filled += span.numel
    return [task for task in tasks if task]
