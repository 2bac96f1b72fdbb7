"""Directories that appear whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resafe.errors import InputError
from resafe.provenance import versions

MARKER = "resafe.json"
_RESERVE = 64 << 20  # bytes left free for configuration, logs and the file system itself


@contextmanager
def staged(out: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yields a new directory beside `out` that is renamed onto it on success and removed on any error or interrupt.

    A marker file (`resafe.json`) is left in the result: only a directory that has one, or an empty one, is ever
    replaced. What was at `out` stays as it was until the new directory is complete.

    Args:
        out: The directory to appear; its parents are made. A link is followed.
        keep_existing: Where `out` came to be meanwhile (another process made the same), keep that one.

    Raises:
        InputError: `out` is a file, or a directory with content that resafe did not write.
    """
    target = Path(os.path.realpath(out))
    if not keep_existing:
        check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    staging = target.parent / f".{target.name}.staging-{unique}"
    staging.mkdir()
    try:
        yield staging
        mark(staging)
        _commit(staging, target, target.parent / f".{target.name}.replaced-{unique}", keep_existing)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def commit(ready: Path, target: Path) -> None:
    """Puts a finished directory in its place in one move; an earlier output is removed after it.

    Args:
        ready: The directory, on the target's file system; gets the marker that tells our directories.
        target: Where it goes, links resolved.

    Raises:
        InputError: The target holds something that resafe did not write.
    """
    mark(ready)
    _commit(ready, target, target.parent / f".{target.name}.replaced-{os.getpid()}-{uuid.uuid4().hex[:8]}", False)


def ensure_space(path: Path, nbytes: int) -> None:
    """Checks that the disk under `path` (which need not exist yet) can take `nbytes` more bytes.

    Raises:
        InputError: There is no room; the message gives both figures.
    """
    place = Path(os.path.realpath(path))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if nbytes + _RESERVE > free:
        raise InputError(
            f"{path}: writing needs {_size(nbytes)} and the disk has {_size(free)} free",
            "free some space, or write elsewhere",
        )


def _size(nbytes: int) -> str:
    """Bytes in decimal units, as disks are sold: 1 GB is 10⁹ bytes."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10_000_000 else f"{nbytes / 1e6:.2f} MB"


def check_replaceable(target: Path) -> None:
    """Checks that a directory may be written: it is not there, empty, or something that resafe wrote.

    Raises:
        InputError: It is a file, or a directory with content that resafe did not write.
    """
    if {"s3:", "gs:", "hf:"} & set(target.parts):
        raise InputError(f"{target}: is an address, not a directory", "only resafe fuse writes to object storage")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file, not a directory to write to", "give another output directory")
    if target.is_dir() and any(target.iterdir()) and not (target / MARKER).is_file():
        raise InputError(
            f"{target}: is not empty, and resafe did not write it",
            "give another output directory, or empty this one yourself",
        )


def mark(staging: Path) -> None:
    """Writes the marker, and gives weights its permissions: safetensors makes them readable by their owner alone."""
    marker = staging / MARKER
    if not marker.exists():
        marker.write_text(
            json.dumps({"written_by": "resafe", "versions": versions()}, indent=2) + "\n", encoding="utf-8"
        )
    for weights in staging.rglob("*.safetensors"):
        weights.chmod(marker.stat().st_mode & 0o777)


def _commit(staging: Path, target: Path, aside: Path, keep_existing: bool) -> None:
    """Renames onto the target; an earlier output is moved aside first, and moved back if that fails."""
    try:
        os.rename(staging, target)  # also replaces an empty directory
        return
    except OSError:
        if not target.is_dir():
            raise
    if keep_existing:
        return
    check_replaceable(target)
    os.rename(target, aside)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
