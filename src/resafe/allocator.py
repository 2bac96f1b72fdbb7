"""What glibc does with freed memory. Knows no tensors; does nothing with another C library."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT = 1 << 25  # the largest threshold that glibc moves to by itself
LARGE = 1 << 30
"""More than any tensor of a model that a CPU trains: weights that a step forms anew need no new pages then."""


def give_back_memory() -> None:
    """Frees what nothing refers to: models hold reference cycles, and glibc keeps freed pages for later use."""
    gc.collect()
    _trim()


def _trim() -> None:
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def freed_memory_kept(largest: int = _KEPT) -> Iterator[None]:
    """Inside it buffers that are freed stay with the process for the next ones; then they go back.

    By default a thread that frees a few small tensors returns their pages to the system and has them zeroed again for
    the next ones, and every tensor above 32 MiB has pages of its own. glibc raises its thresholds to 32 and 64 MiB by
    itself once a buffer of 32 MiB was freed, and they stay raised.

    Args:
        largest: Bytes of a buffer that is kept at most, below 2 GiB.
    """
    set_option = _function("mallopt")

    def keep(size: int) -> None:
        if set_option is not None:
            set_option(_M_MMAP_THRESHOLD, size)
            set_option(_M_TRIM_THRESHOLD, 2 * size - 1)  # an int holds it

    keep(largest)
    try:
        yield
    finally:
        keep(_KEPT)
        _trim()  # cycles are left to Python: collecting them all takes a third of a second beside large libraries


def _function(name: str) -> Any:
    """A function of the C library; None where it has none of that name, as musl."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
