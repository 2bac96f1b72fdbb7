"""Checks an output directory against its receipts. Reads every byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resafe.checkpoints import read_header
from resafe.engine.pool import in_order, usable_cores
from resafe.engine.receipts import Receipt, read_receipts
from resafe.errors import InputError
from resafe.provenance import digest_file


@dataclass(frozen=True)
class FileCheck:
    """What was found of one file: problems (none if it is as written), and its receipt."""

    receipt: Receipt
    problems: tuple[str, ...]


def verify(directory: Path, tick: Callable[[int], None] | None = None) -> list[FileCheck]:
    """Checks length, digest and header of every file, and names the tensors with NaN or infinite values.

    Args:
        directory: What `resafe fuse` wrote.
        tick: Called with the bytes of each file that was checked.

    Raises:
        InputError: The directory has no receipts.
    """
    receipts = read_receipts(directory)
    found = []
    for check in in_order(lambda receipt: _check(directory, receipt), receipts, min(usable_cores(), 4)):
        found.append(check)
        if tick:
            tick(check.receipt.nbytes)
    return found


def _check(directory: Path, receipt: Receipt) -> FileCheck:
    path = directory / receipt.file
    problems = []
    if not path.is_file():
        problems.append("is missing")
    elif (size := path.stat().st_size) != receipt.nbytes:
        problems.append(f"has {size} bytes, {receipt.nbytes} were written")
    elif digest_file(path) != receipt.sha256:
        problems.append("its bytes are not those that were written (SHA-256 differs)")
    else:
        try:
            read_header(path)
        except InputError as error:
            problems.append(error.message)
    for what, counts in (("NaN", receipt.nan), ("infinite values", receipt.inf)):
        problems += [f"tensor {name} holds {count} {what}" for name, count in sorted(counts.items())]
    return FileCheck(receipt, tuple(problems))
