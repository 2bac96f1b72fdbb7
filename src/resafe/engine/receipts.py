"""What is known of a finished output file: its digest and what is in it. A unit with a receipt is never redone."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resafe.errors import InputError

RECEIPTS = "resafe-receipts.json"


@dataclass(frozen=True)
class Receipt:
    """One output file.

    Attributes:
        file: Its name.
        plan: Digest of the plan it belongs to.
        sha256: SHA-256 of the whole file.
        nbytes: Its length.
        norm: Euclidean norm of all fused tensors together.
        nan: Fused tensors that hold NaN, with the number of such entries.
        inf: The same for infinite values.
        seconds: Seconds of work.
    """

    file: str
    plan: str
    sha256: str
    nbytes: int
    norm: float
    nan: dict[str, int]
    inf: dict[str, int]
    seconds: float


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Writes a receipt by renaming, so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(asdict(receipt), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_receipt(path: Path, plan: str) -> Receipt | None:
    """The receipt of a file that belongs to a plan, or None."""
    try:
        found = Receipt(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.plan == plan else None


def write_receipts(directory: Path, receipts: list[Receipt], facts: dict[str, Any]) -> None:
    """All receipts of an output directory in one file, with facts about the run (inputs, method)."""
    content = {"version": 1, **facts, "files": [asdict(receipt) for receipt in receipts]}
    (directory / RECEIPTS).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_receipts(directory: Path) -> list[Receipt]:
    """The receipts of an output directory.

    Raises:
        InputError: There are none, or they cannot be read.
    """
    path = directory / RECEIPTS
    try:
        return parse_receipts(path.read_bytes(), directory)
    except FileNotFoundError:
        raise no_receipts(directory) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})", "fuse again") from error


def parse_receipts(content: bytes, directory: Path | str) -> list[Receipt]:
    """The receipts in the content of an output's receipts file.

    Raises:
        InputError: It is damaged; `directory` names the output.
    """
    try:
        return [Receipt(**entry) for entry in json.loads(content)["files"]]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{directory}/{RECEIPTS}: cannot be read ({error})", "fuse again") from error


def no_receipts(directory: Path | str) -> InputError:
    """The error for an output without a receipts file."""
    return InputError(f"{directory}: has no {RECEIPTS}", "only what resafe fuse wrote can be verified")
