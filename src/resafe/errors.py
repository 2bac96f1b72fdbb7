"""The errors a user sees: what was wrong, where, and what to do. The command line prints them without a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class ResafeError(Exception):
    """Something failed that resafe can explain.

    Args:
        message: What was wrong and where (file, tensor, field).
        hint: What to do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class InputError(ResafeError):
    """What the user gave is wrong: a recipe, a file, a checkpoint, an argument."""

    exit_code = 2


class GateError(ResafeError):
    """A measured figure did not meet the bound that the user set."""

    exit_code = 3


def listed(problems: Sequence[str], most: int = 10) -> str:
    """Problems for a message, a line each, and how many more there are than `most`."""
    more = len(problems) - most
    return "\n  ".join(problems[:most]) + (f"\n  and {more} more" if more > 0 else "")
