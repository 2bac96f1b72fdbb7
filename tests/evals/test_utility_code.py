"""Programs in the sandbox: what they may do, and what hostile ones may not. All run under hard limits."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

pytest.importorskip("lm_eval")

from resafe.errors import ResafeError
from resafe.evals.utility import code
from resafe.evals.utility.code import Limits, Sandbox, SandboxedCode, Verdict, pass_at_k


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """The strongest protection that this machine allows."""
    try:
        return Sandbox(Limits(seconds=4), unconfined=True)
    except ResafeError as error:
        pytest.skip(f"no sandbox here: {error}")


@pytest.fixture(scope="module")
def sealed(sandbox: Sandbox) -> Sandbox:
    if not sandbox.namespaces:
        pytest.skip("this kernel allows no namespaces: only limits are in force")
    return sandbox


def test_endings_are_told_apart(sandbox):
    assert sandbox.run("def f(x):\n    return x + 1\nassert f(1) == 2").status == "passed"
    assert sandbox.run("assert 1 == 2, 'no'") == Verdict("failed", "AssertionError: no")
    assert sandbox.run("def f(:").status == "failed"
    assert sandbox.run("raise SystemExit(0)").status == "failed"  # leaving early is no pass
    assert sandbox.run("import os; os._exit(0)").status == "failed"
    assert sandbox.run("print('नमस्ते 你好')\nassert '你好' == '\\u4f60\\u597d'").status == "passed"


def test_time_is_limited_and_counted_apart():
    short = Sandbox(Limits(seconds=0.5), unconfined=True)
    assert short.run("while True: pass") == Verdict("timed_out")
    assert short.run("import time; time.sleep(60)") == Verdict("timed_out")


def test_memory_is_limited(sandbox):
    verdict = sandbox.run("x = bytearray(2 << 30)")
    assert verdict == Verdict("failed", "MemoryError")


def test_endless_output_ends_the_program(sandbox):
    assert sandbox.run("while True: print('x' * 1000)") == Verdict("killed", "too much output")


def test_files_are_limited(sandbox):
    assert "File too large" in sandbox.run("open('a', 'wb').write(bytes(20 << 20))").detail


def test_processes_are_limited(sandbox):
    # At most 12 forks are tried, and the limit is 8: harmless even where the limit should fail.
    program = (
        "import os, time\nmade = 0\ntry:\n    for _ in range(12):\n        if os.fork() == 0:\n"
        "            time.sleep(2); os._exit(0)\n        made += 1\n"
        "except BlockingIOError:\n    raise SystemExit(f'stopped after {made}')\n"
    )
    verdict = sandbox.run(program)
    assert verdict.status == "failed" and int(verdict.detail.removeprefix("stopped after ")) < 8


def test_a_fork_bomb_is_bounded_and_ends_with_all_its_children(sealed, monkeypatch):
    test_processes_are_limited(sealed)  # first a bomb of twelve: should the limit fail, no more is tried
    user = code._free_user()
    monkeypatch.setattr(code, "_free_user", lambda: user)
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    assert Sandbox(Limits(seconds=1)).run(bomb) == Verdict("timed_out")
    if os.getuid() == 0:  # then the program had a user of its own, and nobody else has it
        for _ in range(100):  # the kernel ends them, in its own time
            left = [entry for entry in os.listdir("/proc") if entry.isdigit() and _owner(entry) == user]
            if not left:
                return
            time.sleep(0.1)
        assert left == []


def _owner(process: str) -> int:
    try:
        return os.stat(f"/proc/{process}").st_uid
    except OSError:  # ended meanwhile
        return -1


def test_signals_reach_nobody_outside(sealed):
    assert sealed.run("import os\nos.kill(-1, 9)").status != "timed_out"  # this process is still here
    assert "ProcessLookupError" in sealed.run(f"import os\nos.kill({os.getpid()}, 9)").detail


def test_the_scratch_directory_is_limited(sealed):
    many = "for n in range(60):\n    open(str(n), 'wb').write(bytes(1 << 20))"
    assert "No space left on device" in sealed.run(many).detail


def test_what_a_program_starts_ends_with_it(sealed, tmp_path):
    marker = f"resafe-orphan-{os.getpid()}-{tmp_path.name}"
    python = sealed._settings("", 0)["python"]
    program = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        f"        os.execv({python!r}, ['python', '-c', 'import time; time.sleep(20)', {marker!r}])\n"
        "    os._exit(0)\ntime.sleep(0.3)\n"
    )
    assert sealed.run(program).status == "passed"
    alive = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    alive += [entry] if marker.encode() in file.read() else []
            except OSError:
                continue
    assert alive == []


def test_the_environment_is_empty_and_root_is_gone(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    program = "import os\nassert not set(os.environ) - {'LC_CTYPE'}, dict(os.environ)\nassert os.getuid() != 0\n"
    assert sandbox.run(program) == Verdict("passed")


def test_there_is_no_network(sealed):
    with socket.socket() as server:  # a server that this process could reach
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        verdict = sealed.run(program)
        assert verdict.status == "failed" and ("unreachable" in verdict.detail or "refused" in verdict.detail)
        accepted = threading.Thread(target=server.accept, daemon=True)
        accepted.start()
        socket.create_connection(("127.0.0.1", port), 2).close()  # the same address, from outside
        accepted.join(2)
        assert not accepted.is_alive()


def test_neither_datagrams_nor_names_nor_local_sockets(sealed):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(0.2)
        here = server.getsockname()
        program = f"import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', {here})"
        assert sealed.run(program).status == "failed"
        with pytest.raises(TimeoutError):
            server.recv(1)
    with socket.socket(socket.AF_UNIX) as server:  # a name without a file, which a chroot alone would not hide
        server.bind(f"\0resafe-test-{os.getpid()}")
        server.listen()
        program = f"import socket\nsocket.socket(socket.AF_UNIX).connect('\\0resafe-test-{os.getpid()}')"
        assert "refused" in sealed.run(program).detail
    assert "gaierror" in sealed.run("import socket\nsocket.getaddrinfo('example.org', 80)").detail


def test_files_outside_cannot_be_read(sealed, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    secret.chmod(0o666)
    for path in ("/etc/passwd", "/proc/1/environ", str(secret), os.path.abspath(__file__)):
        assert "FileNotFoundError" in sealed.run(f"print(open({path!r}).read())").detail
    assert sealed.run(f"open({str(secret)!r}, 'w')").status == "failed"
    assert secret.read_text() == "secret"
    denied = sealed.run("import os; open(os.__file__, 'a')").detail
    assert "Read-only file system" in denied or "Permission denied" in denied


def test_the_protection_is_named_and_the_weaker_one_works_or_says_why(sandbox, monkeypatch):
    assert sandbox.protection == (code.NAMESPACES if sandbox.namespaces else code.LIMITS)
    real = Sandbox._trial
    monkeypatch.setattr(Sandbox, "_trial", lambda self: "no namespaces" if self.namespaces else real(self))
    try:
        weak = Sandbox(Limits(seconds=2), unconfined=True)
    except ResafeError as error:
        pytest.skip(str(error))  # as root, where the interpreter lies in root's own home
    assert weak.protection == code.LIMITS and weak.run("x = 1").status == "passed"
    assert weak.run("while True: print('x' * 1000)").status == "killed"


def test_it_stands_for_code_eval():
    class Counting:
        protection = "none"

        def run(self, program: str) -> Verdict:
            return Verdict("passed" if "return a + b" in program else "timed_out")

    metric = SandboxedCode(Counting())  # type: ignore[arg-type]
    candidates = ["def add(a, b):\n    return a + b", "def add(a, b):\n    while True: pass"]
    rates, results = metric.compute(["assert add(2, 3) == 5"], [candidates], [1, 2])
    assert rates == {"pass@1": 0.5, "pass@2": 1.0}
    assert [result["passed"] for _, result in results[0]] == [True, False]
    assert metric.summary() == {"passed": 1, "failed": 0, "timed_out": 1, "killed": 0, "protection": "none"}


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 1 − C(3,2)/C(4,2)
    assert pass_at_k(5, 0, 3) == 0.0
    assert pass_at_k(3, 2, 2) == 1.0


@pytest.fixture
def no_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without namespaces; the limits alone are found to work."""

    def trial(self: Sandbox) -> str:
        return "OSError: unshare: Operation not permitted" if self.namespaces else ""

    monkeypatch.setattr(Sandbox, "_trial", trial)


def test_without_namespaces_nothing_runs_unless_it_is_asked_for(no_namespaces):
    with pytest.raises(ResafeError, match="no namespaces.*unshare") as error:
        Sandbox()
    assert "--allow-unconfined-code" in error.value.hint and "\n" not in str(error.value.hint)
    allowed = Sandbox(unconfined=True)
    assert not allowed.namespaces and allowed.protection == code.LIMITS
    with pytest.raises(ResafeError):
        SandboxedCode().prepare()
    SandboxedCode(unconfined=True).prepare()


def test_with_namespaces_the_second_leave_changes_nothing(sealed):
    assert Sandbox(Limits(seconds=4), unconfined=True).protection == code.NAMESPACES


def test_the_command_says_so_before_a_model_is_loaded(no_namespaces, monkeypatch, capsys):
    from resafe.cli import app

    def said(*options: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["resafe", "eval", "utility", "no/such", "--tasks", "humaneval", *options])
        with pytest.raises(SystemExit) as stop:
            app.main()
        return int(stop.value.code or 0), capsys.readouterr().err.replace("\n", " ")

    assert said()[0] == 2
    code_, text = said("--allow-code-execution")
    assert code_ == 1 and "--allow-unconfined-code" in text and "no/such" not in text
    code_, text = said("--allow-unconfined-code")
    assert code_ == 2 and "--allow-code-execution" in text
    code_, text = said("--allow-code-execution", "--allow-unconfined-code")
    assert code_ == 2 and "no/such" in text  # only now is the model looked for


def test_a_task_that_runs_programs_by_itself_is_refused(sandbox):
    from resafe.errors import InputError
    from resafe.evals.utility.tasks import _check_code

    metric = SandboxedCode(sandbox)

    class Task:
        def __init__(self, **scope: object) -> None:
            exec("def score(references, predictions): return 0.0", scope)
            self._metric_fn_list = {"score": scope["score"].__call__, "other": None}

    _check_code("humaneval", Task(compute_=metric), metric)
    with pytest.raises(InputError, match="outside any sandbox"):
        _check_code("cruxeval", Task(), metric)
    with pytest.raises(InputError, match="--allow-code-execution|runs programs"):
        _check_code("humaneval", Task(compute_=metric), None)


def test_tasks_whose_scoring_evaluates_answers_are_refused_too():
    """SCORE's maths tasks call sympy's parse_expr, which is eval, and do not say that they are unsafe."""
    from types import SimpleNamespace

    from resafe.evals.utility.tasks import _runs_outside

    def task(file, metric=None):
        scope: dict[str, object] = {}
        exec(compile("def process_results(doc, results): return {}", file, "exec"), scope)
        config = SimpleNamespace(task="t", process_results=scope["process_results"])
        return SimpleNamespace(config=config, _metric_fn_list={"m": metric})

    where = "/lib/python/site-packages/lm_eval/tasks"
    assert _runs_outside(task(f"{where}/score/math/utils_math.py"))
    assert not _runs_outside(task(f"{where}/gsm8k/utils.py", metric=len))


def test_a_program_does_not_find_the_sign_of_a_pass_where_it_looks_first(sandbox):
    forged = "import __main__, os\nos.write(__main__.fd, __main__.token.encode())\nos._exit(0)\n"
    assert sandbox.run(forged + "assert False\n").status == "failed"
    assert sandbox.run("import os\nos._exit(0)\n").status == "failed"  # leaving early is no pass
