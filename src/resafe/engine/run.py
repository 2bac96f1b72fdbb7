"""Carries out a plan: first pass, units, commit. With several ranks each does its share and the last one commits."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from resafe.checkpoints import ensure_space
from resafe.checkpoints.staging import check_replaceable, commit
from resafe.checkpoints.writer import write_companions, write_json
from resafe.engine.card import fusion_card
from resafe.engine.compute import Computer
from resafe.engine.inputs import InputDigests
from resafe.engine.layout import Unit, index_of
from resafe.engine.plan import Plan
from resafe.engine.pool import in_order, single_threaded_tensors, usable_cores
from resafe.engine.receipts import Receipt, read_receipt, read_receipts, write_receipts
from resafe.engine.spans import Span, tasks_of
from resafe.engine.stage import Stage, entered, stage_of
from resafe.engine.unit import run_unit
from resafe.errors import InputError, ResafeError
from resafe.provenance import versions

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""
_POLL_S = 0.2


@dataclass(frozen=True)
class Outcome:
    """What a process did.

    Attributes:
        out: The output directory.
        committed: Whether the output is complete and in its place; False where other ranks are still at work.
        receipts: Receipts of all files that are finished.
        redone: Number of files that this process wrote anew.
        seconds: Seconds it took.
    """

    out: Path
    committed: bool
    receipts: tuple[Receipt, ...]
    redone: int
    seconds: float


def execute(
    plan: Plan, *, threads: int | None = None, rank: int = 0, world: int = 1, progress: Progress | None = None,
    wait_s: float = 3600.0,
) -> Outcome:  # fmt: skip
    """Carries out a plan, or what is left of it.

    Args:
        plan: The plan.
        threads: Worker threads; None is one a usable core, 1 is serial.
        rank: Which share of the files this process does, 0 to world − 1.
        world: Number of processes; they share nothing but the directory.
        progress: Told of bytes written, and read in the first pass.
        wait_s: How long to wait for the other ranks' part of the first pass.

    Raises:
        InputError: The output directory is not ours, has no room, or is taken by another process.
        ResafeError: The disk failed, or another rank did not come.
    """
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} of {world}", "ranks are numbered from 0 to world − 1")
    start, stage = time.monotonic(), stage_of(plan.request.out)
    check_replaceable(stage.out)
    workers = threads or usable_cores()
    with (
        entered(stage, plan.digest, rank, world),
        single_threaded_tensors(workers),
        InputDigests(plan) as digests,
        contextlib.closing(plan.files),
    ):
        ensure_space(stage.path, plan.bytes_written - _present(stage, plan))
        mine = [unit for unit in plan.units if unit.number % world == rank]
        computer = Computer(plan, {})
        for round_ in range(plan.fusion.rounds("model")):
            totals = _round(computer, stage, mine, round_, workers, progress, wait_s)
            computer = Computer(plan, totals)
        done, total, redone = 0, sum(unit.nbytes for unit in mine), 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress("fuse", done, total)

        for unit in mine:
            redone += read_receipt(stage.path / f"{unit.file}.receipt", plan.digest) is None
            run_unit(computer, unit, stage.path, workers, tick)
            digests.failed()
        committed = _commit(plan, stage, digests.result())
    receipts = tuple(committed or [])
    return Outcome(stage.out, committed is not None, receipts, redone, time.monotonic() - start)


def _present(stage: Stage, plan: Plan) -> int:
    """Bytes that the finished files, and the room that a killed run had taken, already fill."""
    names = [name for unit in plan.units for name in (unit.file, f"{unit.file}.partial")]
    return sum((stage.path / name).stat().st_size for name in names if (stage.path / name).is_file())


def _round(
    computer: Computer, stage: Stage, mine: list[Unit], round_: int, threads: int, progress: Progress | None,
    wait_s: float,
) -> dict[str, Any]:  # fmt: skip
    """One round of the first pass: summaries of this rank's units into files, then the total over all ranks' files."""
    plan = computer.plan
    kept = stage.path / f"round-{round_}"
    kept.mkdir(exist_ok=True)
    total_bytes = sum(unit.nbytes for unit in mine)
    for place, unit in enumerate(mine):
        path = kept / f"{unit.number}.safetensors"
        if not path.is_file():
            _store(path, _summary(computer, unit, round_, threads))
        if progress:
            progress(f"first pass, round {round_ + 1}", sum(u.nbytes for u in mine[: place + 1]), total_bytes)
    paths = [kept / f"{unit.number}.safetensors" for unit in plan.units]
    deadline = time.monotonic() + wait_s
    while missing := [path.stem for path in paths if not path.is_file()]:
        if time.monotonic() > deadline:
            raise ResafeError(f"the first pass over files {', '.join(missing)} did not come", "start the other ranks")
        time.sleep(_POLL_S)
    stored = (load_file(path) for path in paths)
    return plan.fusion.total((found["summary"] for found in stored if found), round_, computer.totals)


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
    partial = path.with_suffix(".partial")
    save_file({} if summary is None else {"summary": summary.contiguous()}, partial)
    partial.replace(path)


def _commit(plan: Plan, stage: Stage, inputs: dict[str, str]) -> list[Receipt] | None:
    """Puts the finished output in its place if all files are there; None if some are still missing."""
    with stage.setup():
        if not stage.path.is_dir():  # another rank was the last
            return read_receipts(stage.out)
        receipts = [read_receipt(stage.path / f"{unit.file}.receipt", plan.digest) for unit in plan.units]
        found = [receipt for receipt in receipts if receipt is not None]
        if len(found) < len(plan.units):
            return None
        ready = stage.path.parent / f"{stage.path.name}-ready"
        shutil.rmtree(ready, ignore_errors=True)
        ready.mkdir()
        for unit in plan.units:
            _same_file(stage.path / unit.file, ready / unit.file)
        facts = {
            "plan": plan.digest,
            "method": plan.fusion.name,
            "settings": plan.fusion.resolved(),
            "seed": plan.fusion.seed,
            "inputs": inputs,
            "versions": versions(),
        }
        write_receipts(ready, found, facts)
        write_companions(ready, plan.base, _main_dtype(plan), fusion_card(plan, facts))
        if plan.extended is not None:
            plan.extended.extension.write(ready)
        if len(plan.units) > 1:  # last: without it the shards are no checkpoint
            write_json(ready / "model.safetensors.index.json", index_of(plan.units))
        commit(ready, stage.out)
        stage.remove()
    return found


def _same_file(source: Path, target: Path) -> None:
    """A second name for a file, so that a kill before the end of the commit leaves the staging directory whole."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        source.replace(target)


def _main_dtype(plan: Plan) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for unit in plan.units:
        for tensor in unit.tensors:
            if tensor.dtype.is_floating_point:
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
