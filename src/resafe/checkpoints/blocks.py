"""Blocks of remote files in memory: each is fetched once while it is in use, and the next one beforehand.

A fusion reads small pieces, one after the other; a request for each would cost more than its bytes. Knows files by
their ranges only.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from resafe.checkpoints.storage import RemoteFile

BLOCK = 8 << 20
"""Bytes of a block."""
_REQUESTS = 8  # at once


@dataclass
class _Block:
    """A block that is there or on its way; `followed` once its successor was asked for."""

    content: Future[memoryview]
    followed: bool = False


class Blocks:
    """Reads remote files through a cache of blocks, shared by all threads; the longest unused ones make room.

    Args:
        capacity: Bytes that all blocks may take together.
        block: Bytes of one block; None is `BLOCK`, or less where a few would not fit.
    """

    def __init__(self, capacity: int, block: int | None = None) -> None:
        self.size = block or max(1, min(BLOCK, capacity // 16))
        self._most = max(2, capacity // self.size)
        self._kept: OrderedDict[tuple[RemoteFile, int], _Block] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def read(self, file: RemoteFile, offset: int, buffer: memoryview) -> None:
        """Fills a buffer from a place in a file.

        Raises:
            InputError: The file changed, or is gone.
            ResafeError: The storage cannot be reached.
        """
        done = 0
        while done < len(buffer):
            number, within = divmod(offset + done, self.size)
            part = self._content(file, number)[within : within + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    @property
    def held(self) -> int:
        """Bytes of all blocks that are there or on their way."""
        with self._lock:
            return sum(min(self.size, file.size - number * self.size) for file, number in self._kept)

    def close(self) -> None:
        """Forgets all blocks. The cache can be used again."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._kept.clear()
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _content(self, file: RemoteFile, number: int) -> memoryview:
        with self._lock:
            block = self._block(file, number)
            # Only what is read in sequence is read ahead: a lone tensor of a file must not bring its neighbours along.
            if not block.followed and (file, number - 1) in self._kept:
                block.followed = True
                if (number + 1) * self.size < file.size:
                    self._block(file, number + 1)
        return block.content.result()

    def _block(self, file: RemoteFile, number: int) -> _Block:
        """The block, asked for if it is not there; the caller holds the lock."""
        block = self._kept.get((file, number))
        if block is None:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="resafe-fetch")
            start = number * self.size
            block = _Block(self._pool.submit(file.fetch, start, min(file.size, start + self.size)))
            self._kept[file, number] = block
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end((file, number))
        return block
