"""Where a fusion's output goes: a directory that appears by one rename, or a prefix in object storage.

In object storage nothing can be renamed, so the order of the uploads does what the rename does on a disk: a finished
file goes there at once and its local bytes are freed, and what makes a checkpoint of the files goes last.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol

from resafe.checkpoints import Prefix, open_prefix
from resafe.checkpoints.staging import MARKER, check_replaceable, commit
from resafe.engine.layout import Unit
from resafe.engine.receipts import RECEIPTS, Receipt, parse_receipts, read_receipts
from resafe.engine.stage import Stage
from resafe.errors import InputError, ResafeError
from resafe.provenance import versions

_CONFIGS = ("config.json", "adapter_config.json")


class Target(Protocol):
    """The place of an output. As a context it ends what goes on beside the work."""

    def check(self) -> None:
        """Raises an `InputError` where resafe may not write."""
        ...

    def room(self, units: list[Unit]) -> int:
        """Bytes that the units need on the local disk, beside those that are filled already."""
        ...

    def has(self, unit: Unit) -> bool:
        """Whether a finished file is in its place, with nothing left to do for it."""
        ...

    def take(self, unit: Unit) -> None:
        """Takes a file that is finished in the staging directory."""
        ...

    def flush(self) -> None:
        """Returns when all that was taken is safe."""
        ...

    def complete(self, unit: Unit) -> bool:
        """Whether a file with a receipt is ready for the commit, whichever rank made it."""
        ...

    def commit(self, ready: Path, units: tuple[Unit, ...]) -> None:
        """Makes the output appear: the units, and the files of the directory `ready`."""
        ...

    def receipts(self) -> list[Receipt]:
        """Receipts of the output that is in its place."""
        ...

    def __enter__(self) -> Target: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Directory:
    """A local directory.

    Args:
        stage: Its staging directory, beside it.
    """

    def __init__(self, stage: Stage) -> None:
        assert isinstance(stage.out, Path)
        self._stage, self._out = stage, stage.out

    def check(self) -> None:
        """See `Target`."""
        check_replaceable(self._out)

    def room(self, units: list[Unit]) -> int:
        """See `Target`; a killed run's files, and the room it had taken, are there already."""
        names = [name for unit in units for name in (unit.file, f"{unit.file}.partial")]
        present = sum((self._stage.path / name).stat().st_size for name in names if (self._stage.path / name).is_file())
        return sum(unit.nbytes for unit in units) - present

    def has(self, unit: Unit) -> bool:
        """See `Target`: what is in the staging directory still has to be moved."""
        return False

    def take(self, unit: Unit) -> None:
        """See `Target`."""

    def flush(self) -> None:
        """See `Target`."""

    def complete(self, unit: Unit) -> bool:
        """See `Target`."""
        return True

    def commit(self, ready: Path, units: tuple[Unit, ...]) -> None:
        """See `Target`."""
        for unit in units:
            _same_file(self._stage.path / unit.file, ready / unit.file)
        commit(ready, self._out)

    def receipts(self) -> list[Receipt]:
        """See `Target`."""
        return read_receipts(self._out)

    def __enter__(self) -> Directory:
        """Nothing goes on beside the work."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""


class Upload:
    """A prefix in object storage. One file is uploaded while the next is computed.

    Args:
        stage: The staging directory, in the cache.
        plan: Digest of the plan, which the marker in the prefix names.
    """

    def __init__(self, stage: Stage, plan: str) -> None:
        self._stage, self._plan = stage, plan
        self._prefix: Prefix = open_prefix(str(stage.out))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="resafe-upload")
        self._pending: Future[None] | None = None
        self._there: dict[str, tuple[int, str]] = {}

    def check(self) -> None:
        """See `Target`; also looks at what an earlier run of the same plan left there."""
        files = self._prefix.files()
        if MARKER not in files and not self._prefix.is_empty():
            raise InputError(
                f"{self._prefix.url}: is not empty, and resafe did not write it",
                "give another address, or empty this one yourself",
            )
        if self._ours():
            self._there = {name: (file.size, file.etag) for name, file in files.items()}

    def room(self, units: list[Unit]) -> int:
        """See `Target`: one file is computed while another is uploaded."""
        return sum(sorted(unit.nbytes for unit in units)[-2:])

    def has(self, unit: Unit) -> bool:
        """See `Target`: the upload was acknowledged, and the file is still the one that was sent."""
        sent = self._sent(unit.file)
        return sent is not None and self._there.get(unit.file) == (unit.nbytes, sent)

    def take(self, unit: Unit) -> None:
        """See `Target`."""
        self.flush()  # at most one file waits on the disk
        self.claim()
        self._pending = self._pool.submit(self._send, unit.file)

    def flush(self) -> None:
        """See `Target`."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def complete(self, unit: Unit) -> bool:
        """See `Target`."""
        return self._sent(unit.file) is not None

    def commit(self, ready: Path, units: tuple[Unit, ...]) -> None:
        """See `Target`."""
        if not self._ours():
            raise ResafeError(f"{self._prefix.url}: another run has begun to write there", "write to another address")
        self._put_all(ready)
        shutil.rmtree(ready)

    def receipts(self) -> list[Receipt]:
        """See `Target`."""
        return parse_receipts(self._prefix.read(RECEIPTS), self._prefix.url)

    def claim(self) -> None:
        """Makes the prefix this plan's: an earlier output goes, what made a checkpoint of it first."""
        if self._there:
            return
        with self._stage.setup():
            if not self._ours():
                self._prefix.delete(sorted(self._prefix.files(), key=_rank, reverse=True))
                marker = {"written_by": "resafe", "plan": self._plan, "versions": versions()}
                self._prefix.put(MARKER, (json.dumps(marker, indent=2) + "\n").encode())
        self._there[MARKER] = (0, "")

    def upload(self, directory: Path) -> None:
        """Makes a finished directory the output, without units."""
        self.claim()
        self._put_all(directory)

    def _put_all(self, directory: Path) -> None:
        """Uploads the files of a directory, those last that make a checkpoint of the others."""
        for path in sorted(directory.iterdir(), key=lambda path: (_rank(path.name), path.name)):
            if path.name != MARKER:
                self._prefix.put(path.name, path)

    def __enter__(self) -> Upload:
        """The thread that uploads begins with the first file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the upload under way."""
        self._pool.shutdown(cancel_futures=True)

    def _ours(self) -> bool:
        """Whether the prefix was claimed for this plan."""
        if MARKER not in self._prefix.files():
            return False
        try:
            return bool(json.loads(self._prefix.read(MARKER)).get("plan") == self._plan)
        except (ValueError, AttributeError):
            return False

    def _send(self, file: str) -> None:
        path = self._stage.path / file
        etag = self._prefix.put(file, path)
        sent = self._stage.path / f"{file}.sent"
        partial = sent.with_name(f"{sent.name}.partial")
        partial.write_text(json.dumps(etag), encoding="utf-8")
        partial.replace(sent)
        path.unlink()

    def _sent(self, file: str) -> str | None:
        """The ETag of a file whose upload was acknowledged."""
        try:
            return str(json.loads((self._stage.path / f"{file}.sent").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None


def target_of(stage: Stage, plan: str) -> Target:
    """The target of a stage."""
    return Directory(stage) if isinstance(stage.out, Path) else Upload(stage, plan)


def _rank(name: str) -> int:
    """The place of a file in the order of uploads: weights, others, the index, the configuration."""
    if name in _CONFIGS:
        return 3
    if name.endswith(".index.json"):
        return 2
    return 0 if name.endswith(".safetensors") else 1


def _same_file(source: Path, target: Path) -> None:
    """A second name for a file, so that a kill before the end of the commit leaves the staging directory whole."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        source.replace(target)
