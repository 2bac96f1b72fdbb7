"""Stages of a run: a directory each, named by the digest of all it depends on; a receipt marks it as finished."""

from __future__ import annotations

import fcntl
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resafe.allocator import give_back_memory
from resafe.checkpoints import ensure_space
from resafe.errors import InputError
from resafe.files import write_whole
from resafe.provenance import digest_value, versions

RECEIPT = "receipt.json"


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: For people, e.g. "tune-arithmetic".
        digest: Of all the stage depends on: its own part of the recipe and the stages before it.
        path: Its directory.
    """

    name: str
    digest: str
    path: Path

    @property
    def receipt(self) -> dict[str, Any] | None:
        """The receipt of the finished stage, or None."""
        try:
            found = json.loads((self.path / RECEIPT).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return found if found.get("digest") == self.digest else None


class Run:
    """A run directory with its stages.

    Args:
        root: The directory; made if it is missing.
        say: Called with one line for people when a stage is skipped, started or finished.
        room: Bytes that the disk must have free before the first stage that is to be done.
    """

    def __init__(self, root: Path, say: Callable[[str], None], room: int = 0) -> None:
        self.root, self.say, self.room = root, say, room
        self.done: list[Stage] = []
        self.redone = 0

    def stage(self, name: str, depends: Any, work: Callable[[Path], dict[str, Any] | None]) -> Stage:
        """Does a stage unless its receipt says that it is done.

        Args:
            name: Name of the stage.
            depends: JSON-like value that holds everything its result depends on.
            work: Called with the stage's directory; whatever an earlier, killed attempt left there is still in it.
                What it returns goes into the receipt.

        Returns:
            The finished stage.

        Raises:
            InputError: There is something to do and no room on the disk for it.
        """
        digest = digest_value([name, depends])
        stage = Stage(name, digest, self.root / "stages" / f"{name}-{digest[:12]}")
        if stage.receipt is None:
            if self.redone == 0:
                ensure_space(self.root, self.room)
            self.redone += 1
            self.say(f"{name} …")
            stage.path.mkdir(parents=True, exist_ok=True)
            before, start = _earlier_seconds(stage.path), time.monotonic()
            with _clock(stage.path, before, start):
                facts = work(stage.path) or {}
            seconds = before + time.monotonic() - start
            write_json(
                stage.path / RECEIPT,
                {
                    "stage": name,
                    "digest": digest,
                    "seconds": round(seconds, 2),
                    "peak_memory_gb": round(peak_memory_gb(), 3),
                    "versions": versions(),
                    "facts": facts,
                },
            )
            # Only now: what a killed attempt would go on from must last until the receipt is there.
            shutil.rmtree(stage.path / "work", ignore_errors=True)
            give_back_memory()
            self.say(f"{name} done in {seconds:.0f} s")
        else:
            self.say(f"{name} is already done")
        self.done.append(stage)
        return stage

    def seconds(self) -> float:
        """Seconds that the run's stages took, over all attempts that finished."""
        return sum(float((stage.receipt or {}).get("seconds", 0.0)) for stage in self.done)

    def peak_memory_gb(self) -> float:
        """The highest resident memory of any process that did a stage, in 10⁹ bytes."""
        return max((float((stage.receipt or {}).get("peak_memory_gb", 0.0)) for stage in self.done), default=0.0)


def peak_memory_gb() -> float:
    """Peak resident memory of this process so far, in 10⁹ bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds a run directory for this process; the kernel lets go of it when the process ends, however it ends.

    Raises:
        InputError: Another process is at work in it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{root}: another resafe process is at work in this run directory",
                "wait for it, or choose another --out",
            ) from None
        yield


def _earlier_seconds(path: Path) -> float:
    try:
        return float((path / "seconds").read_text())
    except (FileNotFoundError, ValueError):
        return 0.0


@contextmanager
def _clock(path: Path, before: float, start: float) -> Iterator[None]:
    """Keeps the time of an attempt that fails, so that the receipt's seconds count it (a killed one cannot tell)."""
    try:
        yield
    except BaseException:
        (path / "seconds").write_text(str(before + time.monotonic() - start))
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file by renaming, so that a kill leaves the old one or the new one."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=True) + "\n")
