"""Runs programs that a model wrote, each in a process of its own that can harm nothing. Knows nothing of models.

Where the kernel allows it a program gets its own namespaces: no network at all, a file system of a small scratch
directory and the interpreter (read-only), and no other process in sight; when its time is over all that it started ends
with it. Everywhere: an empty environment, a temporary directory, a user without rights where we are root, and limits
on memory, processor time, wall time, processes, open files, file size and output.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from resafe.errors import ResafeError
from resafe.evals.utility.tasks import CodeMetric

Status = Literal["passed", "failed", "timed_out", "killed"]

NAMESPACES = "own namespaces (no network, own file system, own processes) and limits"
LIMITS = "limits only: this kernel allows no namespaces here, so a program could reach the network and read files"


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Wall time; processor time is bounded at two seconds more.
        memory: Bytes of address space of each process.
        processes: Processes and threads together.
        file_size: Bytes of a file.
        disk: Bytes of the scratch directory, with namespaces.
        output: Bytes on standard output and error together; more ends the program.
    """

    seconds: float = 3.0  # as in the reference implementation of HumanEval
    memory: int = 512 << 20
    processes: int = 8
    file_size: int = 8 << 20
    disk: int = 32 << 20
    output: int = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """How a program ended.

    Attributes:
        status: "passed": it came to its end; "failed": it raised or left early; "timed_out"; "killed": by a limit.
        detail: The last line of its output, or which limit; may be empty.
    """

    status: Status
    detail: str = ""


class Sandbox:
    """Runs programs, with one protection for all of them.

    Args:
        limits: For each program.
        unconfined: Where the kernel allows no namespaces, go on with limits alone.

    Raises:
        ResafeError: There are no namespaces here, and no leave to do without; or no protection works at all.
    """

    def __init__(self, limits: Limits | None = None, *, unconfined: bool = False) -> None:
        self.limits = limits or Limits()
        self.namespaces = True
        sealed = self._trial()
        if not sealed:
            return
        if not unconfined:
            raise ResafeError(
                f"programs that the model writes cannot be shut in here: the kernel allows no namespaces ({sealed})",
                "measure on another machine; or, on one that may be lost, let them reach its network and files: "
                "--allow-unconfined-code",
            )
        self.namespaces = False
        limited = self._trial()
        if limited:
            raise ResafeError(f"programs cannot be run here: {sealed}; {limited}", "measure on another machine")

    @property
    def protection(self) -> str:
        """Which protection is active, for people."""
        return NAMESPACES if self.namespaces else LIMITS

    def run(self, program: str) -> Verdict:
        """Runs a program to its end or to a limit.

        Raises:
            ResafeError: The jail could not be built; the program did not run.
        """
        verdict, jail = self._run(program)
        if jail:
            raise ResafeError(f"the sandbox failed: {jail}", "measure on another machine")
        return verdict

    def _trial(self) -> str:
        """Why the protection does not work here; empty if it does."""
        verdict, jail = self._run("import math\n")
        return jail or ("" if verdict.status == "passed" else f"a trial program {verdict.status}: {verdict.detail}")

    def _run(self, program: str) -> tuple[Verdict, str]:
        report, writer = os.pipe()
        token = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="resafe-code-", ignore_cleanup_errors=True) as directory:
            settings = self._settings(directory, writer)
            if not self.namespaces and os.getuid() == 0:
                os.chown(directory, settings["user"], settings["user"])
            process = subprocess.Popen(
                [settings["python"], "-I", "-S", "-B", str(Path(__file__).with_name("jail.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={}, cwd="/", pass_fds=(writer,), start_new_session=True,
            )  # fmt: skip
            os.close(writer)
            text = f"{json.dumps(settings)}\n{token}\n{program}".encode("utf-8", "surrogatepass")
            try:
                output, ended = _watch(process, text, self.limits)
            finally:
                _end(process)
            said = _drain(report)
        if said.startswith("jail: "):
            return Verdict("killed"), said.removeprefix("jail: ")
        return _verdict(ended, said == token, process.returncode, output), ""

    def _settings(self, directory: str, report: int) -> dict[str, Any]:
        limits, processor = self.limits, int(self.limits.seconds) + 2
        return {
            "namespaces": self.namespaces,
            "directory": directory,
            "report": report,
            "python": os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
            "visible": _visible(),
            "user": _free_user(),
            "disk": limits.disk,
            "limits": {
                "RLIMIT_CPU": processor,
                "RLIMIT_AS": limits.memory,
                "RLIMIT_NPROC": limits.processes,
                "RLIMIT_FSIZE": limits.file_size,
                "RLIMIT_NOFILE": 64,
                "RLIMIT_CORE": 0,
            },
        }


def _free_user() -> int:
    """A user id that nobody else is likely to have, among those that exist here (containers may map a few)."""
    try:
        ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except (OSError, ValueError):
        ranges = []
    highest = max((start + count - 1 for start, _, count in ranges), default=(1 << 32) - 2)
    return min(200_000 + secrets.randbelow(1_000_000_000), highest)


def _visible() -> list[str]:
    """Paths that the interpreter needs: its own prefix and the system's libraries."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    prefixes = {os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix)}
    wanted = {os.path.join(prefix, "lib") for prefix in prefixes} | {os.path.dirname(python)}
    wanted |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/null"}
    found = sorted(path for path in wanted if os.path.exists(path))
    return [path for path in found if not any(path.startswith(other + "/") for other in found)]


def _watch(process: subprocess.Popen[bytes], text: bytes, limits: Limits) -> tuple[bytes, str]:
    """Feeds the program and reads what it says, until it ends; the output and "", "time" or "output"."""
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + limits.seconds
    output = bytearray()
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return bytes(output), "time"
            for key, _ in selector.select(left):
                if key.fileobj is process.stdin:
                    try:
                        text = text[os.write(key.fd, text[:65536]) :]
                    except BrokenPipeError:
                        text = b""
                    if not text:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(process.stdout)
                output += chunk
                if len(output) > limits.output:
                    return bytes(output), "output"
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return bytes(output), "time"
    return bytes(output), ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the program and all of its session; with namespaces also what has left the session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None and not stream.closed:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _drain(descriptor: int) -> str:
    """What is in the pipe now; a process that got away may hold the other end open."""
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, 4096).decode("utf-8", "replace")
    except BlockingIOError:
        return ""
    finally:
        os.close(descriptor)


def _verdict(ended: str, reported: bool, code: int, output: bytes) -> Verdict:
    lines = output[-2000:].decode("utf-8", "replace").strip().splitlines()
    last = lines[-1] if lines else ""
    if ended == "time" or code in (128 + signal.SIGXCPU, -signal.SIGXCPU):
        return Verdict("timed_out")
    if ended == "output":
        return Verdict("killed", "too much output")
    if reported and code == 0:
        return Verdict("passed")
    if code > 128 or code < 0:
        return Verdict("killed", f"signal {code - 128 if code > 128 else -code}")
    return Verdict("failed", last)


class SandboxedCode(CodeMetric):
    """Stands for the metric `code_eval`: same arguments and results, programs in the sandbox, endings counted."""

    def __init__(self, sandbox: Sandbox | None = None, *, unconfined: bool = False) -> None:
        self.given, self.unconfined = sandbox, unconfined
        self.counts: Counter[str] = Counter()

    @cached_property
    def sandbox(self) -> Sandbox:
        """The one given, or one that is set up at its first use, as `Sandbox` says."""
        return self.given or Sandbox(unconfined=self.unconfined)

    def prepare(self) -> None:
        """Raises ResafeError where programs cannot be run."""
        assert self.sandbox

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        """Runs each candidate with its test; pass@k by the unbiased estimator (Chen et al. 2021, equation 1)."""
        trial = references == ["assert add(2, 3)==5"]  # lm-eval's module makes this call when it is imported
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for task, (test, candidates) in enumerate(zip(references, predictions, strict=True)):
            for number, candidate in enumerate(candidates):
                verdict = Verdict("failed") if trial else self.sandbox.run(candidate + "\n" + test)
                if not trial:
                    self.counts[verdict.status] += 1
                result = {"task_id": task, "passed": verdict.status == "passed", "result": verdict.status}
                results.setdefault(task, []).append((number, {**result, "completion_id": number}))
        rates: dict[str, float] = {}
        for size in k:
            if all(len(found) >= size for found in results.values()):
                each = [pass_at_k(len(found), sum(r["passed"] for _, r in found), size) for found in results.values()]
                rates[f"pass@{size}"] = sum(each) / len(each)
        return rates, results

    def summary(self) -> dict[str, Any]:
        """How programs ended, and under which protection; empty where none ran."""
        if not self.counts:
            return {}
        endings = {status: self.counts[status] for status in ("passed", "failed", "timed_out", "killed")}
        return {**endings, "protection": self.sandbox.protection}


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): the chance that of k drawn from n candidates, c of them right, one is right."""
    from math import comb

    return 1.0 - comb(n - correct, k) / comb(n, k)
