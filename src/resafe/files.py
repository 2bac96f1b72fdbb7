"""Files that appear whole or not at all, and lists of names as users write them. Knows no formats."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, with the same ending; it takes the place of `path` when the block ends.

    A reader, or a kill, meets the old file or the new one, never half a file. Where the block raises, the old file
    stays and the new one is removed. Makes the directory where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes text in UTF-8 with its line ends as they are, whole or not at all; a lone surrogate becomes "?"."""
    with replacing(path) as beside:
        beside.write_bytes(text.encode("utf-8", errors="replace"))


def split_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Names with commas between, or a list of such: without spaces around them, none empty, none twice."""
    parts = [given] if isinstance(given, str) else given
    return tuple(dict.fromkeys(name.strip() for part in parts for name in str(part).split(",") if name.strip()))
