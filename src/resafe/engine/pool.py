"""Threads whose results come in the order of their tasks, with few under way, and how they share the cores."""

from __future__ import annotations

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


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
