"""Replies kept on disk, one line each, so that a killed run goes on where it stopped. Knows no prompt and no key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from resafe.errors import InputError


class ReplyCache:
    """An append-only file of replies by the digest of their request.

    A line is written by one system call the moment a reply is there, so `kill -9` loses at most the requests under
    way; a line that was torn is overlooked. The file holds replies, never prompts, responses or keys.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, dict[str, Any]] | None = None
        self._handle: int | None = None

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored reply, or None."""
        return self._load().get(key)

    def put(self, key: str, reply: dict[str, Any]) -> None:
        """Stores a reply; a second one for the same request is dropped."""
        if key in self._load():
            return
        self._load()[key] = reply
        line = json.dumps({"key": key, **reply}, ensure_ascii=True) + "\n"
        os.write(self._open(), line.encode())

    def close(self) -> None:
        """Makes sure that all is on the disk."""
        if self._handle is not None:
            os.fsync(self._handle)
            os.close(self._handle)
            self._handle = None

    def _load(self) -> dict[str, dict[str, Any]]:
        if self._found is None:
            self._found = {}
            if self.path.is_file():
                for line in self.path.read_bytes().splitlines():
                    try:
                        row = json.loads(line)
                        self._found.setdefault(row.pop("key"), row)
                    except (ValueError, KeyError, AttributeError, TypeError):  # torn by a kill
                        continue
        return self._found

    def _open(self) -> int:
        if self._handle is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            except OSError as error:
                raise InputError(
                    f"{self.path}: cannot be written ({error.strerror})", "give cache a file that can"
                ) from None
            size = os.fstat(self._handle).st_size
            if size and os.pread(self._handle, 1, size - 1) != b"\n":
                os.write(self._handle, b"\n")  # ends a torn line, so that the next one is whole
        return self._handle
