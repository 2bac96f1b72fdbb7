"""Where the units of a plan are worked on: in this process, or as tasks of a cluster. The result does not depend on it.

An executor shares nothing with what it starts but the staging directory: summaries and receipts lie there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from resafe.engine.compute import Computer
from resafe.engine.layout import Unit
from resafe.engine.plan import Plan
from resafe.engine.pool import usable_cores
from resafe.engine.stage import alone
from resafe.engine.summary import summarise_unit
from resafe.engine.unit import run_unit
from resafe.errors import InputError

ExecutorName = Literal["serial", "threads", "ray"]
"""One thread of this process, several, or Ray tasks."""

Tick = Callable[[int], None]
"""Called with the number of output bytes that were just dealt with; what it raises ends the work."""

Finished = Callable[[Unit], None]
"""Called with a unit when its file and receipt are there."""


class Executor(Protocol):
    """Works through units; what is finished in the staging directory already is not done again."""

    def summarise(self, units: Sequence[Unit], round_: int, totals: dict[str, Any], tick: Tick) -> None:
        """Stores the units' summaries in a round of the first pass, given the totals of the rounds before it."""
        ...

    def write(self, units: Sequence[Unit], totals: dict[str, Any], tick: Tick, finished: Finished) -> None:
        """Writes the units' files and receipts, given the totals of the first pass."""
        ...


@dataclass(frozen=True)
class LocalExecutor:
    """One unit after the other in this process, each by several threads.

    Attributes:
        plan: The plan.
        stage: The staging directory.
        threads: Worker threads; 1 is serial.
    """

    plan: Plan
    stage: Path
    threads: int

    def summarise(self, units: Sequence[Unit], round_: int, totals: dict[str, Any], tick: Tick) -> None:
        """See `Executor`."""
        computer = Computer(self.plan, totals)
        for unit in units:
            with alone(self.stage, unit.number):
                summarise_unit(computer, unit, round_, self.stage, self.threads)
            tick(unit.nbytes)

    def write(self, units: Sequence[Unit], totals: dict[str, Any], tick: Tick, finished: Finished) -> None:
        """See `Executor`."""
        computer = Computer(self.plan, totals)
        for unit in units:
            with alone(self.stage, unit.number):
                run_unit(computer, unit, self.stage, self.threads, tick)
            finished(unit)


def threads_of(executor: ExecutorName, threads: int | None) -> int:
    """Threads that work on one unit: as asked for, or one a usable core; a Ray task has one unless asked for more.

    Raises:
        InputError: There is no such executor, or it cannot have so many threads.
    """
    if executor not in get_args(ExecutorName):
        raise InputError(f"there is no executor '{executor}'", f"choose from {', '.join(get_args(ExecutorName))}")
    if executor == "serial" and threads not in (None, 1):
        raise InputError(f"the serial executor has one thread, {threads} are asked for", "choose threads")
    return threads or (usable_cores() if executor == "threads" else 1)


@contextmanager
def opened(executor: ExecutorName, plan: Plan, stage: Path, threads: int, address: str | None) -> Iterator[Executor]:
    """The executor of that name, ready to work.

    Args:
        executor: Its name.
        plan: The plan.
        stage: The staging directory.
        threads: Threads that work on one unit.
        address: Of the Ray cluster; None takes the one that runs here, or starts one for the time being.

    Raises:
        InputError: Ray is not installed, cannot be reached, or has no node with so many cores.
    """
    if executor != "ray":
        yield LocalExecutor(plan, stage, threads)
        return
    from resafe.engine.ray_executor import RayExecutor, connected

    with connected(address) as ray:
        yield RayExecutor(ray, plan, stage, threads)
