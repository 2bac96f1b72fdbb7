"""Carries out a plan: first pass, units, commit. With several ranks each does its share and the last one commits."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resafe.allocator import freed_memory_kept
from resafe.checkpoints import ensure_space
from resafe.checkpoints.writer import write_companions, write_json
from resafe.engine.card import fusion_card
from resafe.engine.executors import ExecutorName, opened, threads_of
from resafe.engine.inputs import InputDigests
from resafe.engine.layout import Unit, index_of
from resafe.engine.plan import Plan
from resafe.engine.pool import single_threaded_tensors
from resafe.engine.receipts import Receipt, read_receipt, write_receipts
from resafe.engine.stage import Stage, entered, stage_of
from resafe.engine.summary import summaries, summary_path
from resafe.engine.target import Target, target_of
from resafe.engine.unit import is_finished
from resafe.errors import InputError, ResafeError
from resafe.provenance import versions

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""
_POLL_S = 0.2


@dataclass(frozen=True)
class Outcome:
    """What a process did.

    Attributes:
        out: The output directory, or its address in object storage.
        committed: Whether the output is complete and in its place; False where other ranks are still at work.
        receipts: Receipts of all files that are finished.
        redone: Number of files that this process wrote anew.
        seconds: Seconds it took.
    """

    out: Path | str
    committed: bool
    receipts: tuple[Receipt, ...]
    redone: int
    seconds: float


def execute(
    plan: Plan, *, threads: int | None = None, rank: int = 0, world: int = 1, progress: Progress | None = None,
    wait_s: float = 3600.0, executor: ExecutorName = "threads", ray_address: str | None = None,
) -> Outcome:  # fmt: skip
    """Carries out a plan, or what is left of it.

    Args:
        plan: The plan.
        threads: Worker threads; None is one a usable core, 1 is serial. Under Ray, threads of a task; None is 1.
        rank: Which share of the files this process does, 0 to world − 1.
        world: Number of processes; they share nothing but the directory (and the cache, for object storage).
        progress: Told of bytes written, and read in the first pass.
        wait_s: How long to wait for the other ranks' part of the first pass.
        executor: Where this process's share is worked on; the output's bytes do not depend on it.
        ray_address: Of a Ray cluster; None takes the one that runs here, or starts one.

    Raises:
        InputError: The output's place is not ours, has no room, or is taken by another process; an input changed; no
            such executor.
        ResafeError: The disk or object storage failed, or another rank did not come.
    """
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} of {world}", "ranks are numbered from 0 to world − 1")
    start, stage = time.monotonic(), stage_of(plan.request.out, plan.base.cache)
    target = target_of(stage, plan.digest)
    target.check()
    workers = threads_of(executor, threads)
    with (
        entered(stage, plan.digest, rank, world),
        single_threaded_tensors(workers),
        freed_memory_kept(),
        InputDigests(plan) as digests,
        contextlib.closing(plan.files),
        target,
    ):
        ensure_space(stage.path, target.room(list(plan.units)))
        mine = [unit for unit in plan.units if unit.number % world == rank]
        waiting = [unit for unit in mine if not target.has(unit)]
        redone = sum(not is_finished(unit, stage.path, plan.digest) for unit in waiting)
        with opened(executor, plan, stage.path, workers, ray_address) as works:
            totals: dict[str, Any] = {}
            for round_ in range(plan.fusion.rounds("model")):
                tick = _ticks(f"first pass, round {round_ + 1}", mine, progress, digests)
                works.summarise(mine, round_, totals, tick)
                totals = _total(plan, stage, round_, totals, wait_s)
            tick = _ticks("fuse", mine, progress, digests)
            if len(waiting) < len(mine):
                tick(sum(unit.nbytes for unit in mine) - sum(unit.nbytes for unit in waiting))
            works.write(waiting, totals, tick, target.take)
        target.flush()
        committed = _commit(plan, stage, target, digests.result())
    receipts = tuple(committed or [])
    return Outcome(stage.out, committed is not None, receipts, redone, time.monotonic() - start)


def _ticks(what: str, units: list[Unit], progress: Progress | None, digests: InputDigests) -> Callable[[int], None]:
    """Adds up what is done of the units; raises what the digests have found meanwhile."""
    done, total = 0, sum(unit.nbytes for unit in units)

    def tick(count: int) -> None:
        nonlocal done
        digests.failed()
        done += count
        if progress:
            progress(what, done, total)

    return tick


def _total(plan: Plan, stage: Stage, round_: int, totals: dict[str, Any], wait_s: float) -> dict[str, Any]:
    """The total of a round over all ranks' summaries, once they are there."""
    paths = [summary_path(stage.path, round_, unit) for unit in plan.units]
    deadline = time.monotonic() + wait_s
    while missing := [path.stem for path in paths if not path.is_file()]:
        if time.monotonic() > deadline:
            raise ResafeError(f"the first pass over files {', '.join(missing)} did not come", "start the other ranks")
        time.sleep(_POLL_S)
    return plan.fusion.total(summaries(paths), round_, totals)


def _commit(plan: Plan, stage: Stage, target: Target, inputs: dict[str, str]) -> list[Receipt] | None:
    """Puts the finished output in its place if all files are there; None if some are still missing."""
    with stage.setup():
        if not stage.path.is_dir():  # another rank was the last
            return target.receipts()
        receipts = [read_receipt(stage.path / f"{unit.file}.receipt", plan.digest) for unit in plan.units]
        found = [receipt for receipt in receipts if receipt is not None]
        if len(found) < len(plan.units) or not all(target.complete(unit) for unit in plan.units):
            return None
        ready = stage.path.parent / f"{stage.path.name}-ready"
        shutil.rmtree(ready, ignore_errors=True)
        ready.mkdir()
        facts = {
            "plan": plan.digest,
            "method": plan.fusion.name,
            "settings": plan.fusion.resolved(),
            "seed": plan.fusion.seed,
            "inputs": inputs,
            "remote_files": {name: [file.state for file in c.remote] for name, c in plan.remote.items()},
            "versions": versions(),
        }
        write_receipts(ready, found, facts)
        write_companions(ready, plan.base, _main_dtype(plan), fusion_card(plan, facts))
        if plan.extended is not None:
            plan.extended.extension.write(ready)
        if len(plan.units) > 1:  # last: without it the shards are no checkpoint
            write_json(ready / "model.safetensors.index.json", index_of(plan.units))
        target.commit(ready, plan.units)
        stage.remove()
    return found


def _main_dtype(plan: Plan) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for unit in plan.units:
        for tensor in unit.tensors:
            if tensor.dtype.is_floating_point:
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
