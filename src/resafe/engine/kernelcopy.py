"""Bytes of one file into another by the kernel, without passing through this process. Knows no tensor.

Never a hard link: two names of one file are one file, so a tool that later edits the output in place (quantises it,
renames a tensor) would edit the input as well. `copy_file_range` shares blocks only where the file system copies on
write (Btrfs, XFS with reflinks), which is as cheap and keeps the two apart.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

_AT_ONCE = 64 << 20
"""Bytes a call: progress is told, and an interruption is noticed, between calls."""
_BUFFER = 4 << 20
_UNSUPPORTED = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def copy_bytes(
    source: int, offset: int, target: int, place: int, count: int, tick: Callable[[int], None] | None = None
) -> None:
    """Copies `count` bytes at `offset` of one open file to `place` in another; both keep their own positions.

    Args:
        source: Descriptor to read.
        offset: First byte in it.
        target: Descriptor to write.
        place: Where the bytes go in it.
        count: Number of bytes.
        tick: Told of the bytes copied, call by call.

    Raises:
        OSError: The disk is full or failing, or the source ends too early.
    """
    done, by_kernel = 0, hasattr(os, "copy_file_range")
    while done < count:
        wanted = min(_AT_ONCE, count - done)
        try:
            if by_kernel:
                moved = os.copy_file_range(source, target, wanted, offset + done, place + done)
            else:
                moved = os.pwrite(target, os.pread(source, min(wanted, _BUFFER), offset + done), place + done)
        except OSError as error:
            if not by_kernel or error.errno not in _UNSUPPORTED:
                raise
            by_kernel = False  # not between these two file systems
            continue
        if moved == 0:
            raise OSError(errno.EIO, "the file that is copied ends too early")
        done += moved
        if tick:
            tick(moved)
