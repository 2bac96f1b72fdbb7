"""Units as Ray tasks, one a unit, on any nodes that see the same files under the same paths.

A task gets the request and opens a plan of its own; tensors go from files to files, and only a receipt comes back. Ray
starts a task again whose worker or node died. Knows Ray; imports it when it is used.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from resafe.engine.compute import Computer
from resafe.engine.layout import Unit
from resafe.engine.plan import Plan, build_plan
from resafe.engine.pool import single_threaded_tensors
from resafe.engine.receipts import Receipt
from resafe.engine.request import Request
from resafe.engine.stage import alone
from resafe.engine.summary import summarise_unit
from resafe.engine.unit import run_unit
from resafe.errors import InputError, ResafeError

_RETRIES = 3
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Job:
    """What all tasks of a fusion have in common.

    Attributes:
        request: What was asked for.
        digest: Digest of the plan that this makes.
        directory: The directory that the request's relative paths start from.
        stage: The staging directory.
        threads: Threads of a task.
    """

    request: Request
    digest: str
    directory: Path
    stage: Path
    threads: int


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The `ray` module, connected; a connection that was there before stays.

    Args:
        address: Of the cluster's head; None takes the cluster that runs here, or starts one on this machine's cores.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a fusion tells nobody that it happened
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise InputError("the ray executor needs the ray package", "pip install 'resafe[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    hint = "start one with: ray start --head; where it asks for a token, name its file in RAY_AUTH_TOKEN_PATH"
    try:
        _knock(address)
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        where = f"at {address}" if address else "on this machine"
        raise InputError(f"no Ray cluster {where} ({error})", hint) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str | None) -> None:
    """Raises OSError at once where nobody listens; Ray itself would try for minutes."""
    place = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address or "")
    if place:
        socket.create_connection((place[1], int(place[2])), timeout=5).close()


class RayExecutor:
    """Units as Ray tasks; see `resafe.engine.executors.Executor`.

    Args:
        ray: The connected `ray` module.
        plan: The plan.
        stage: The staging directory, which all nodes see.
        threads: Threads, and cores, of a task.

    Raises:
        InputError: No node has so many cores: tasks would wait for ever.
    """

    def __init__(self, ray: Any, plan: Plan, stage: Path, threads: int) -> None:
        cores = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if threads > cores:
            raise InputError(
                f"a task of {threads} threads fits no Ray node: the largest has {cores:g} cores", "ask less"
            )
        self._ray = ray
        self._job = Job(plan.request, plan.digest, Path.cwd(), stage, threads)
        self._options = {"num_cpus": threads, "max_retries": _RETRIES, "retry_exceptions": True}

    def summarise(
        self, units: Sequence[Unit], round_: int, totals: dict[str, Any], tick: Callable[[int], None]
    ) -> None:
        """Stores the units' summaries, a task each."""
        self._run(summary_task, units, (round_, totals), tick)

    def write(
        self, units: Sequence[Unit], totals: dict[str, Any], tick: Callable[[int], None],
        finished: Callable[[Unit], None],
    ) -> None:  # fmt: skip
        """Writes the units' files, a task each."""
        self._run(file_task, units, (totals,), tick, finished)

    def _run(
        self, function: Callable[..., Any], units: Sequence[Unit], arguments: tuple[Any, ...],
        tick: Callable[[int], None], finished: Callable[[Unit], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Starts all tasks and waits for them; a failure, or an interrupt, takes back those that are not done."""
        task = self._ray.remote(function).options(**self._options)
        waiting = {task.remote(self._job, unit.number, *arguments): unit for unit in units}
        try:
            while waiting:
                (done, *_), _ = self._ray.wait(list(waiting), num_returns=1)
                unit = waiting.pop(done)
                self._check(unit, done)
                tick(unit.nbytes)
                finished(unit)
        finally:
            for reference in waiting:
                self._ray.cancel(reference)
            if waiting:  # so that nothing writes there any more when the next run begins
                self._ray.wait(list(waiting), num_returns=len(waiting), timeout=_PATIENCE_S)

    def _check(self, unit: Unit, done: Any) -> None:
        try:
            result = self._ray.get(done)
        except self._ray.exceptions.RayError as error:
            raise ResafeError(
                f"{unit.file}: its Ray task failed {_RETRIES + 1} times, at last with: {_last_line(error)}",
                "run again when the cause is removed; finished files are kept",
            ) from error
        if isinstance(result, ResafeError):
            raise result


def summary_task(job: Job, number: int, round_: int, totals: dict[str, Any]) -> ResafeError | None:
    """Stores one unit's summary; an error that explains itself comes back as a value, since trying again is no use."""
    try:
        with _planned(job) as plan, alone(job.stage, number):
            summarise_unit(Computer(plan, totals), plan.units[number], round_, job.stage, job.threads)
    except ResafeError as error:
        return error
    return None


def file_task(job: Job, number: int, totals: dict[str, Any]) -> Receipt | ResafeError:
    """Writes one unit's file and gives its receipt; errors as in `summary_task`."""
    try:
        with _planned(job) as plan, alone(job.stage, number):
            return run_unit(Computer(plan, totals), plan.units[number], job.stage, job.threads)
    except ResafeError as error:
        return error


@contextlib.contextmanager
def _planned(job: Job) -> Iterator[Plan]:
    """The job's plan, made anew from what this node sees.

    Raises:
        InputError: The node does not see what the process sees that started the job.
    """
    if not (job.directory.is_dir() and job.stage.is_dir()):
        missing = job.stage if job.directory.is_dir() else job.directory
        raise InputError(
            f"{missing}: is not on {platform.node()}", "work in a directory that all nodes share under one path"
        )
    with contextlib.chdir(job.directory), single_threaded_tensors(job.threads):
        plan = build_plan(job.request)
        with contextlib.closing(plan.files):
            if plan.digest != job.digest:
                raise InputError(
                    f"{platform.node()} sees other inputs than the process that started the fusion",
                    "give all nodes the same files, with the same times, and the same version of resafe",
                )
            yield plan


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
