"""Threads whose results come in the order of their tasks, with few under way, and how they share cores and memory."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_order(function: Callable[[Task], Result], tasks: Iterable[Task], threads: int) -> Iterator[Result]:
    """Results in the order of the tasks. At most two a thread are under way, so that finished ones cannot pile up.

    An error ends it: what has not begun is never done.
    """
    if threads == 1:
        yield from map(function, tasks)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="resafe") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def single_threaded_tensors(threads: int) -> Iterator[None]:
    """Inside it a tensor operation uses one thread, where there are workers to use the others."""
    before = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT = 1 << 25


@contextmanager
def memory_kept() -> Iterator[None]:
    """Inside it glibc keeps freed buffers of up to 32 MiB for the next tensor; afterwards it gives them back.

    By default a thread returns the pages of a piece's buffers to the system with each piece, and zeroing them anew
    takes a quarter of the time. Does nothing with another C library.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _KEPT)
    library.mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT)
    try:
        yield
    finally:
        library.mallopt(_M_TRIM_THRESHOLD, 1 << 17)  # the values that glibc starts with
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 17)
        library.malloc_trim(0)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
