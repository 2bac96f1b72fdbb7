"""Where resafe keeps what it can make again: converted models and digests of large files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root(cache: Path | None = None) -> Path:
    """The cache directory: the argument, else `$RESAFE_CACHE`, else `~/.cache/resafe`. It need not exist yet."""
    if cache is not None:
        return Path(cache)
    named = os.environ.get("RESAFE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "resafe"
