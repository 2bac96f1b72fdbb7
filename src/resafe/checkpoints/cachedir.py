"""Where converted models and digests of large files are kept; the place itself is in `resafe.cachedir`."""

from __future__ import annotations

from resafe.cachedir import cache_root

__all__ = ["cache_root"]
