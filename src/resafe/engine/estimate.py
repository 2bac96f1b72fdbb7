"""What a plan will cost, from a few measured milliseconds of this machine. Reads a little of one input."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from resafe.checkpoints import show_size
from resafe.engine.compute import Computer
from resafe.engine.layout import Placed
from resafe.engine.plan import Plan
from resafe.engine.pool import single_threaded_tensors
from resafe.engine.sources import rows_of
from resafe.engine.spans import PIECE, Span
from resafe.errors import InputError

_READ = 32 << 20


@dataclass(frozen=True)
class Estimate:
    """What a fusion needs.

    Attributes:
        bytes_read: Bytes of inputs, all passes together.
        bytes_written: Bytes of output files.
        memory: Bytes of buffers at most, beside some 400 MB that the libraries take.
        seconds: Seconds, the larger of what the disk and the processors need; None where an input lies in object
            storage, of which only headers are read.
        read_rate: Bytes per second that a sample of the first model was read at (from memory, if it lies there); None
            as before.
    """

    bytes_read: int
    bytes_written: int
    memory: int
    seconds: float | None
    read_rate: float | None


def estimate(plan: Plan, threads: int) -> Estimate:
    """Estimates a plan on this machine with so many threads."""
    if plan.remote:
        return Estimate(plan.bytes_read, plan.bytes_written, needed_memory(plan, threads), None, None)
    read_rate = _read_rate(plan)
    moved = plan.bytes_read + plan.bytes_written
    per_entry = _seconds_per_entry(plan)
    entries = sum(tensor.numel for unit in plan.units for tensor in unit.tensors if tensor.fused)
    computing = entries * per_entry * plan.passes / threads
    return Estimate(
        plan.bytes_read, plan.bytes_written, needed_memory(plan, threads), max(moved / read_rate, computing), read_rate
    )


def needed_memory(plan: Plan, threads: int) -> int:
    """Bytes that buffers take at most: float32 copies of all models for what is computed at once, in every thread.

    Of every remote input each thread has three blocks in use: one that it reads, the next, and one that a span ends in.
    Blocks may take half of the memory.
    """
    copies = 4 * (len(plan.models) * 2 + 4)
    at_once = PIECE
    if plan.fusion.part == "tensor":
        at_once = max((t.numel for unit in plan.units for t in unit.tensors if t.fused), default=PIECE)
    width = max((rows_of(t.shape)[1] for unit in plan.units for t in unit.tensors if t.fused), default=1)
    blocks = 3 * plan.files.blocks.size * len(plan.remote)
    return threads * max(copies * max(at_once, width) + blocks, 2 * blocks)


def fit_threads(plan: Plan, threads: int) -> int:
    """The most threads, up to `threads`, whose buffers fit the request's memory.

    Raises:
        InputError: Not even one thread fits.
    """
    for count in range(threads, 0, -1):
        if needed_memory(plan, count) <= plan.memory:
            return count
    raise InputError(
        f"{plan.fusion.name} needs {show_size(needed_memory(plan, 1))} for the largest tensor, and memory is "
        f"{show_size(plan.memory)}",
        "raise memory, or choose a method that takes tensors in pieces",
    )


def _read_rate(plan: Plan) -> float:
    path = plan.models[0].checkpoint.files[0]
    assert isinstance(path, Path)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as stream:
        count = len(stream.read(_READ))
    return max(1.0, count / max(1e-6, time.perf_counter() - start))


def _seconds_per_entry(plan: Plan) -> float:
    """One piece of the largest tensor, computed with the method itself where it takes pieces."""
    fused = [tensor for unit in plan.units for tensor in unit.tensors if tensor.fused]
    if not fused:
        return 0.0
    tensor: Placed = max(fused, key=lambda placed: placed.numel)
    rows, width = rows_of(tensor.shape)
    span = next(Span(tensor, 0, rows).pieces())
    computer = Computer(plan, {})
    with single_threaded_tensors(2), torch.no_grad():
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            _, deltas = computer.deltas(span)
            if plan.fusion.part != "tensor":
                computer.fuse(span, plan.fusion.gather(partial(list, [deltas])))
            seconds = time.perf_counter() - start
    return seconds / max(1, (span.stop - span.start) * width)
