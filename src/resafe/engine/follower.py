"""A file's digest, and its way to the disk, while it is still being written. Knows no tensor and no plan."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

_HASHED_AT_ONCE = 1 << 20  # what was just written and read is still in a processor's cache
_SYNCED_AT_ONCE = 1 << 28


class Follower:
    """Digests a file and brings it to the disk behind those who write it, in two threads of its own.

    After the last byte there is then little left to hash and to wait for.

    Args:
        descriptor: The file, open for reading and writing.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hasher, self._hashed, self._synced = hashlib.sha256(), 0, 0
        self._buffer = memoryview(bytearray(_HASHED_AT_ONCE))
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="resafe-hash")
        self._syncing = ThreadPoolExecutor(1, thread_name_prefix="resafe-sync")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the threads; what they have not begun is left."""
        for pool in (self._hashing, self._syncing):
            pool.shutdown(cancel_futures=True)

    def advance(self, complete: int) -> None:
        """Everything before byte `complete` is written.

        Raises:
            OSError: The disk failed.
        """
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
        self._waiting.append(self._hashing.submit(self._hash, complete))
        if complete - self._synced >= _SYNCED_AT_ONCE:
            self._synced = complete
            self._waiting.append(self._syncing.submit(os.fsync, self._descriptor))

    def finish(self, nbytes: int) -> str:
        """SHA-256 of the whole file of so many bytes, which is then on the disk.

        Raises:
            OSError: The disk failed, or the file is shorter.
        """
        self.advance(nbytes)
        self._waiting.append(self._syncing.submit(os.fsync, self._descriptor))
        for future in self._waiting:
            future.result()
        return self._hasher.hexdigest()

    def _hash(self, complete: int) -> None:
        while self._hashed < complete:
            size = min(_HASHED_AT_ONCE, complete - self._hashed)
            count = os.preadv(self._descriptor, [self._buffer[:size]], self._hashed)
            if count == 0:
                raise OSError(errno.EIO, "the file is shorter than what was written")
            self._hasher.update(self._buffer[:count])
            self._hashed += count
