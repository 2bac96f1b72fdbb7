"""Runs one program inside a jail; started as a script of its own by `code.py`, with nothing but the standard library.

Reads from standard input a line of JSON (the settings) and then the program. Exit code 90: the jail could not be built,
so nothing ran, and the reason is on the settings' descriptor. A program that came to its end writes the token there.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
from typing import Any

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 1 << 17, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_PDEATHSIG, _NO_NEW_PRIVS = 1, 38
FAILED = 90
RUNNER = (
    "import os,sys\n"
    "def run(fd,token,source):\n"
    "    exec(compile(source,'<program>','exec'),{})\n"
    "    os.write(fd,token)\n"
    "run(int(sys.argv[1]),sys.stdin.readline().strip().encode(),sys.stdin.read())\n"
)
"""The token shows that a program did not leave early; one that looks for it in the frames above can still find it."""


def main(settings: dict[str, Any]) -> None:
    """Builds the jail, and becomes the program in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if settings["namespaces"]:
        _enter_namespaces(libc)
        inner = os.fork()  # the first process of the new process namespace: when it ends, all in it end
        if inner:
            os._exit(_code(os.waitpid(inner, 0)[1]))
        _check(libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        _build_root(libc, settings)
        program = os.fork()
        if program:  # reaps what the program leaves behind
            while True:
                ended, status = os.waitpid(-1, 0)
                if ended == program:
                    os._exit(_code(status))
    else:
        os.chdir(settings["directory"])
    _restrict(libc, settings)
    os.execve(settings["python"], [settings["python"], "-I", "-S", "-B", "-c", RUNNER, str(settings["report"])], {})


def _enter_namespaces(libc: Any) -> None:
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    uid, gid = os.getuid(), os.getgid()
    if uid == 0 and libc.unshare(flags) == 0:
        return
    _check(libc.unshare(flags | _NEWUSER), "unshare")
    for path, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{path}", "w") as file:
            file.write(text)


def _build_root(libc: Any, settings: dict[str, Any]) -> None:
    """A file system of a small scratch directory and, read-only, the interpreter with its libraries."""
    root = settings["directory"]
    _mount(libc, "none", "/", None, _REC | _PRIVATE)
    _mount(libc, "tmpfs", root, "tmpfs", _NOSUID | _NODEV, f"size={settings['disk']},mode=755,nr_inodes=2000")
    for source in settings["visible"]:
        target = root + source
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        _mount(libc, source, target, None, _BIND | _REC)
        kept = os.statvfs(target).f_flag & (_NOSUID | _NODEV | _NOEXEC)
        device = 0 if source.startswith("/dev/") else _RDONLY
        _mount(libc, "none", target, None, _BIND | _REMOUNT | device | _NOSUID | kept)
    os.makedirs(root + "/work")
    os.chmod(root + "/work", 0o777)
    os.chroot(root)
    os.chdir("/work")


def _restrict(libc: Any, settings: dict[str, Any]) -> None:
    for name, value in settings["limits"].items():
        last = value + (name == "RLIMIT_CPU")  # a second between the signal that tells why and the end
        resource.setrlimit(getattr(resource, name), (value, last))
    if os.getuid() == 0:  # root is bound by no limit on processes: the program gets a user that nobody else has
        os.setgroups([])
        os.setresgid(settings["user"], settings["user"], settings["user"])
        os.setresuid(settings["user"], settings["user"], settings["user"])
    _check(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _check(libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _mount(libc: Any, source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind)]
    result = libc.mount(*texts, ctypes.c_ulong(flags), data.encode() if data else None)
    _check(result, f"mount of {source} on {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _code(status: int) -> int:
    """Exit code, or 128 and the signal's number as in a shell."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _line(descriptor: int) -> bytes:
    """Up to the end of a line, byte by byte: the rest of the input is the program's."""
    found = b""
    while not found.endswith(b"\n"):
        found += os.read(descriptor, 1) or b"\n"
    return found


if __name__ == "__main__":
    given = json.loads(_line(0))
    try:
        main(given)
    except BaseException as error:
        os.write(given["report"], f"jail: {type(error).__name__}: {error}".encode())
        os._exit(FAILED)
