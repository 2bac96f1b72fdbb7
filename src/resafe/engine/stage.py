"""The staging directory of a fusion: one plan in it, one process a rank, and a commit that happens once."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from resafe.checkpoints import cache_root
from resafe.errors import InputError
from resafe.provenance import digest_value

_PLAN = "plan.json"


@dataclass(frozen=True)
class Stage:
    """Where the files of an unfinished output are.

    Attributes:
        out: The output directory, or an address in object storage.
        path: The staging directory, beside a directory; in the cache for an address.
    """

    out: Path | str
    path: Path

    @contextmanager
    def setup(self) -> Iterator[None]:
        """Waits until no other process changes the directory as a whole, and keeps others from doing so."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.parent / f"{self.path.name}.lock"
        while True:
            with lock.open("w") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                # The one before us may have removed the file, and a third may have made it anew.
                if lock.exists() and os.fstat(handle.fileno()).st_ino == lock.stat().st_ino:
                    yield
                    return

    def remove(self) -> None:
        """Removes the directory and its lock; a kill leaves the directory whole, or what is not taken for one."""
        gone = self.path.parent / f"{self.path.name}-gone"
        shutil.rmtree(gone, ignore_errors=True)
        self.path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        (self.path.parent / f"{self.path.name}.lock").unlink(missing_ok=True)


def stage_of(out: Path | str, cache: Path | None = None) -> Stage:
    """The staging directory of an output; a link is followed.

    Args:
        out: The directory, or an address in object storage.
        cache: The cache directory, where files are made that go to object storage.
    """
    if isinstance(out, str):
        return Stage(out, cache_root(cache) / "uploads" / digest_value(out)[:16])
    target = Path(os.path.realpath(out))
    return Stage(target, target.parent / f".{target.name}.fusing")


@contextmanager
def entered(stage: Stage, digest: str, rank: int, world: int) -> Iterator[None]:
    """Holds the place of one rank. What an earlier run of another plan left there is removed.

    The kernel lets go of the place when the process ends, however it ends.

    Raises:
        InputError: The rank is taken by a running process, or one is at work there on another plan.
    """
    with ExitStack() as held:
        with stage.setup():
            stage.path.mkdir(exist_ok=True)
            if _plan(stage) != [digest, world]:
                with ExitStack() as others:
                    for path in stage.path.glob(".rank-*"):
                        if not _take(others.enter_context(path.open("w"))):
                            raise _busy(stage)
                    shutil.rmtree(stage.path)
                    stage.path.mkdir()
                    (stage.path / _PLAN).write_text(json.dumps([digest, world]), encoding="utf-8")
            if not _take(held.enter_context((stage.path / f".rank-{rank}").open("w"))):
                raise _busy(stage)
        yield


@contextmanager
def alone(path: Path, number: int) -> Iterator[None]:
    """Holds one unit of a staging directory; waits while another process has it.

    A task whose run was killed, or that a cluster lost sight of, may still be writing the file that is begun anew here.
    """
    with (path / f".unit-{number}").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _plan(stage: Stage) -> list[object] | None:
    try:
        found: list[object] = json.loads((stage.path / _PLAN).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None


def _take(handle: TextIO) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _busy(stage: Stage) -> InputError:
    return InputError(
        f"{stage.out}: another resafe process is at work on this directory", "wait for it, or choose another directory"
    )
