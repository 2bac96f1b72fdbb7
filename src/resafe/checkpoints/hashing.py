"""SHA-256 of large files, remembered in the cache directory so that each is read once. Knows nothing of tensors."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path

from resafe.provenance import digest_file

_FILE = "digests.json"
_KEPT = 4096


def cached_digest(path: Path, cache: Path) -> str:
    """SHA-256 of a file as 64 hex digits; taken from the cache when path, size and modification time are unchanged.

    Args:
        path: The file.
        cache: The cache directory; where it cannot be written, the file is hashed each time.
    """
    key = _key(path)
    known = _load(cache)
    if key in known:
        return known[key]
    digest = digest_file(path)
    if _key(path) == key:  # a file that was written to meanwhile has a digest that belongs to no state of it
        _store(cache, key, digest)
    return digest


def remembered_digest(path: Path, cache: Path) -> str | None:
    """`cached_digest` where it is remembered; None where the file would have to be read."""
    return _load(cache).get(_key(path))


def _key(path: Path) -> str:
    state = path.stat()
    return f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}"


def _load(cache: Path) -> dict[str, str]:
    """The remembered digests; an unreadable or damaged cache counts as empty."""
    try:
        found = json.loads((cache / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str) and len(value) == 64}


def _store(cache: Path, key: str, digest: str) -> None:
    """Adds one digest. Two processes at once may lose an entry (it is hashed again) but never damage the file."""
    entries = {**_load(cache), key: digest}
    text = json.dumps(dict(list(entries.items())[-_KEPT:]), indent=0)
    staging = cache / f".{_FILE}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        staging.write_text(text, encoding="utf-8")
        staging.replace(cache / _FILE)
    except OSError:
        with contextlib.suppress(OSError):
            staging.unlink()
