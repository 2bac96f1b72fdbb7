"""One unit of work: an output file is pre-sized, filled at known offsets, digested, and acknowledged by a receipt."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

from resafe.checkpoints import Checkpoint, TensorInfo
from resafe.engine.compute import Computer
from resafe.engine.follower import Follower
from resafe.engine.kernelcopy import copy_bytes
from resafe.engine.layout import Unit
from resafe.engine.pool import in_order
from resafe.engine.receipts import Receipt, read_receipt, write_receipt
from resafe.engine.sources import bytes_of, rows_of
from resafe.engine.spans import Span, tasks_of
from resafe.errors import InputError, ResafeError

Tick = Callable[[int], None]
"""Called with the number of bytes that were just written."""


def run_unit(computer: Computer, unit: Unit, stage: Path, threads: int, tick: Tick | None = None) -> Receipt:
    """Writes one output file into the staging directory, unless its receipt is there.

    Args:
        computer: Computes its tensors.
        unit: The file.
        stage: The staging directory.
        threads: Worker threads.
        tick: Told of progress.

    Raises:
        ResafeError: The disk is full or failing; what is finished stays.
    """
    acknowledged = stage / f"{unit.file}.receipt"
    receipt = read_receipt(acknowledged, computer.plan.digest)
    if receipt is not None and is_finished(unit, stage, computer.plan.digest):
        if tick:
            tick(unit.nbytes)
        return receipt
    acknowledged.unlink(missing_ok=True)
    start, partial = time.monotonic(), stage / f"{unit.file}.partial"
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _reserve(descriptor, unit.nbytes)
            _write(descriptor, unit.header, 0)
            with Follower(descriptor) as follower:
                facts = _fill(computer, unit, descriptor, threads, follower, tick)
                digest = follower.finish(unit.nbytes)
        finally:
            os.close(descriptor)
        os.replace(partial, stage / unit.file)
    except OSError as error:
        raise ResafeError(
            f"{partial}: cannot be written ({error.strerror or error})",
            "make room and run again; finished files are kept" if error.errno == errno.ENOSPC else "check the disk",
        ) from error
    squares, nan, inf = facts
    receipt = Receipt(
        unit.file, computer.plan.digest, digest, unit.nbytes, squares**0.5, nan, inf, round(time.monotonic() - start, 3)
    )
    write_receipt(acknowledged, receipt)
    return receipt


def is_finished(unit: Unit, stage: Path, plan: str) -> bool:
    """Whether the staging directory holds the unit's file, whole, with its receipt."""
    path = stage / unit.file
    acknowledged = read_receipt(stage / f"{unit.file}.receipt", plan) is not None
    return acknowledged and path.is_file() and path.stat().st_size == unit.nbytes


def _fill(
    computer: Computer, unit: Unit, descriptor: int, threads: int, follower: Follower, tick: Tick | None
) -> tuple[float, dict[str, int], dict[str, int]]:
    """Computes and writes all tensors; Σ x² of the fused ones, and which of them hold NaN and infinite values."""

    def work(task: list[Span]) -> tuple[int, list[tuple[str, float, int, int]]]:
        facts, written = [], 0
        for span in task:
            if not span.numel:
                continue
            width = rows_of(span.tensor.shape)[1]
            statistics = computer.statistics(span) if span.tensor.fused else {}
            for piece in computer.pieces(span):
                stored, squares, nan, inf = computer.output(piece, statistics)
                offset = span.tensor.offset + piece.start * width * span.tensor.dtype.itemsize
                written += _write(descriptor, bytes_of(stored.contiguous()), offset)
                facts.append((span.tensor.name, squares, nan, inf))
        return written, facts

    squares, nans, infs = 0.0, dict[str, int](), dict[str, int]()
    if _copied(computer, unit, descriptor, tick):
        return squares, nans, infs
    complete = len(unit.header)
    for written, facts in in_order(work, tasks_of(unit, computer.undivided), threads):
        complete += written  # tasks come in the order of the file
        follower.advance(complete)
        for name, part, nan, inf in facts:
            squares += part
            for found, count in ((nans, nan), (infs, inf)):
                if count:
                    found[name] = found.get(name, 0) + count
        if tick:
            tick(written)
    return squares, nans, infs


def _copied(computer: Computer, unit: Unit, descriptor: int, tick: Tick | None) -> bool:
    """Copies a file in which nothing is fused and which lies in one piece in a file of the base; else False."""
    first = _unchanged(computer.plan.base, unit)
    if first is None:
        return False
    assert isinstance(first.file, Path)
    with first.file.open("rb", buffering=0) as source:
        begin = len(unit.header)
        if os.fstat(source.fileno()).st_size < first.offset + unit.nbytes - begin:
            raise InputError(f"{first.file}: ends inside its tensors", "the file was cut off since it was opened")
        if first.offset == begin and source.read(begin) == unit.header:
            begin = 0  # the same file to the last byte: whole blocks can be shared where the file system can
        copy_bytes(
            source.fileno(), first.offset - len(unit.header) + begin, descriptor, begin, unit.nbytes - begin, tick
        )
    return True


def _unchanged(base: Checkpoint, unit: Unit) -> TensorInfo | None:
    """The base's first tensor of a unit whose data follow each other in one local file as they will in the unit."""
    infos = [base.tensors[tensor.name] for tensor in unit.tensors]
    if not infos or base.unpickled or base.remote or any(tensor.fused for tensor in unit.tensors):
        return None
    place = infos[0].offset
    for info in infos:
        if info.file != infos[0].file or info.offset != place:
            return None
        place += info.nbytes
    return infos[0]


def _reserve(descriptor: int, nbytes: int) -> None:
    """Takes the room at once, so that a full disk is found before the work and not after it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(descriptor, nbytes)


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done
