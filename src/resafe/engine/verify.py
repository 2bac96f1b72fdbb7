"""Checks an output directory against its receipts. Reads every byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from resafe.checkpoints import File, RemoteFile, open_prefix, read_header
from resafe.engine.pool import in_order, usable_cores
from resafe.engine.receipts import RECEIPTS, Receipt, no_receipts, parse_receipts, read_receipts
from resafe.errors import InputError
from resafe.provenance import digest_stream


@dataclass(frozen=True)
class FileCheck:
    """What was found of one file: problems (none if it is as written), and its receipt."""

    receipt: Receipt
    problems: tuple[str, ...]


def verify(directory: Path | str, tick: Callable[[int], None] | None = None) -> list[FileCheck]:
    """Checks length, digest and header of every file, and names the tensors with NaN or infinite values.

    Args:
        directory: What `resafe fuse` wrote: a directory, or an address in object storage, which is read as a stream.
        tick: Called with the bytes of each file that was checked.

    Raises:
        InputError: There are no receipts.
        ResafeError: Object storage cannot be reached.
    """
    files, receipts = _remote(directory) if isinstance(directory, str) else _local(directory)
    found = []
    for check in in_order(lambda receipt: _check(files.get(receipt.file), receipt), receipts, min(usable_cores(), 4)):
        found.append(check)
        if tick:
            tick(check.receipt.nbytes)
    return found


def _local(directory: Path) -> tuple[Mapping[str, File], list[Receipt]]:
    """The output's files by name, and its receipts."""
    receipts = read_receipts(directory)
    paths = {receipt.file: directory / receipt.file for receipt in receipts}
    return {name: path for name, path in paths.items() if path.is_file()}, receipts


def _remote(url: str) -> tuple[Mapping[str, File], list[Receipt]]:
    """The same in object storage."""
    prefix = open_prefix(url)
    files = prefix.files()
    if RECEIPTS not in files:
        raise no_receipts(url)
    return files, parse_receipts(prefix.read(RECEIPTS), url)


def _digest(file: File) -> str:
    with file.open("rb") as stream:
        return digest_stream(stream)


def _check(path: File | None, receipt: Receipt) -> FileCheck:
    problems = []
    if path is None:
        problems.append("is missing")
    elif (size := path.size if isinstance(path, RemoteFile) else path.stat().st_size) != receipt.nbytes:
        problems.append(f"has {size} bytes, {receipt.nbytes} were written")
    elif _digest(path) != receipt.sha256:
        problems.append("its bytes are not those that were written (SHA-256 differs)")
    else:
        try:
            read_header(path)
        except InputError as error:
            problems.append(error.message)
    for what, counts in (("NaN", receipt.nan), ("infinite values", receipt.inf)):
        problems += [f"tensor {name} holds {count} {what}" for name, count in sorted(counts.items())]
    return FileCheck(receipt, tuple(problems))
