"""Digests of the inputs, taken beside the work, and compared with what is known of them.

Files in object storage are known by their ETags, and are not read again to be hashed.
"""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from resafe.checkpoints import Checkpoint, RemoteFile, cached_digest
from resafe.engine.plan import Plan
from resafe.engine.receipts import RECEIPTS, read_receipts
from resafe.errors import InputError

_SHA256 = re.compile(r"[0-9a-f]{64}")


class InputDigests:
    """SHA-256 of every input file, computed in a thread of its own while the fusion runs.

    Files are hashed in the order in which the fusion reads them, so that hashing also brings them into memory; digests
    are remembered by path, size and time. Where a digest is known beforehand (a file that resafe wrote has a receipt,
    a file in the Hub's cache is named by its digest), a flipped byte is found here.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._checkpoints = {"base": plan.base, **{model.name: model.checkpoint for model in plan.models}}
        companion = plan.fusion.companion
        self._wanted = {"base": companion.base if companion is not None else None}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="resafe-digest")
        self._futures: dict[str, Future[str]] = {}

    def __enter__(self) -> InputDigests:
        """Starts the thread."""
        self._futures = {
            name: self._pool.submit(_checked, name, checkpoint, self._wanted.get(name))
            for name, checkpoint in self._checkpoints.items()
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it; what has not begun is left."""
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def failed(self) -> None:
        """Raises what the thread has found so far."""
        for future in self._futures.values():
            if future.done() and not future.cancelled():
                future.result()

    def result(self) -> dict[str, str]:
        """Digests of the checkpoints by name: "base", and the models' names.

        Raises:
            InputError: A file is not what its receipt, or its name in the Hub's cache, says; or the method reads
                something beside the models that belongs to another base.
        """
        return {name: future.result() for name, future in self._futures.items()}


def _checked(label: str, checkpoint: Checkpoint, wanted: str | None) -> str:
    for path in checkpoint.files:
        if isinstance(path, RemoteFile):
            continue  # each of its ranges is asked for under its ETag
        known = _known(path)
        if known is not None and cached_digest(path, checkpoint.cache) != known:
            raise InputError(
                f"{label}: {path} is damaged: its SHA-256 is not the one that was recorded", "copy or download it again"
            )
    if wanted not in (None, checkpoint.digest):
        raise InputError(
            f"{label}: {checkpoint.reference} is not the base that the method's file was made for",
            "give that base, or set check=false among the method's settings",
        )
    return checkpoint.digest


def _known(path: Path) -> str | None:
    """The digest that a file should have, where something says so."""
    resolved = path.resolve()
    if resolved.parent.name == "blobs" and _SHA256.fullmatch(resolved.name):
        return resolved.name
    if not (path.parent / RECEIPTS).is_file():
        return None
    return next((receipt.sha256 for receipt in read_receipts(path.parent) if receipt.file == path.name), None)
