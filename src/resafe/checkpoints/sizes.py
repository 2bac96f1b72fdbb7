"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

from resafe.errors import InputError

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?B)", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(size: int | str, field: str) -> int:
    """Bytes of a number, or of a text such as "5GB" (10⁹ bytes each).

    Args:
        size: The number or text.
        field: The setting it was given for, for the message.

    Raises:
        InputError: It is neither, or not above zero.
    """
    if isinstance(size, int) and size > 0:
        return size
    matched = _SIZE.fullmatch(str(size).strip())
    count = int(float(matched["number"]) * _UNITS[matched["unit"].upper()]) if matched else 0
    if count <= 0:
        raise InputError(f"{field} {size!r} is not a size", "for example 5GB, 500MB, or a number of bytes")
    return count


def show_size(count: float) -> str:
    """Bytes for people: "2.20 GB"."""
    for unit in ("TB", "GB", "MB", "kB"):
        if count >= _UNITS[unit.upper()]:
            return f"{count / _UNITS[unit.upper()]:.2f} {unit}"
    return f"{count:.0f} B"
