"""Where the work is done does not show in the result; and what goes wrong says the same everywhere."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import resafe
from resafe.checkpoints import open_checkpoint
from resafe.cli.app import app
from resafe.engine import Input, Outcome, Request, build_plan, execute
from resafe.engine.ray_executor import Job, file_task, summary_task
from resafe.engine.receipts import Receipt, read_receipt
from resafe.engine.stage import entered, stage_of
from resafe.errors import InputError, ResafeError

from .conftest import Farm

METHODS: dict[str, dict[str, Any]] = {"dare": {"drop": 0.3}, "della": {}, "ties": {"keep": 0.3, "scope": "model"}}


def run(request: Request, **how: Any) -> Outcome:
    return execute(build_plan(request), **how)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors*")}


def asked(farm: Farm, out: str, method: str, size: int = 1500) -> Request:
    return farm.request(out, method=method, settings=METHODS[method], max_shard_size=size, seed=5)


@pytest.mark.parametrize("method", METHODS)
def test_serial_threads_and_ranks_write_the_same_files(farm: Farm, method: str) -> None:
    assert run(asked(farm, "serial", method), executor="serial").committed
    assert run(asked(farm, "threads", method), executor="threads", threads=2).committed
    with ThreadPoolExecutor(2) as pool:
        shares = [
            pool.submit(run, asked(farm, "ranks", method), executor="serial", rank=rank, world=2) for rank in (0, 1)
        ]
        assert any(share.result().committed for share in shares)
    wanted = files(farm.root / "serial")
    assert len(wanted) > 4
    assert files(farm.root / "threads") == wanted
    assert files(farm.root / "ranks") == wanted


@pytest.mark.parametrize("method", METHODS)
def test_other_files_hold_the_same_tensors(farm: Farm, method: str) -> None:
    found = []
    for size in (700, 1500, 10**6):
        run(asked(farm, str(size), method, size), executor="threads", threads=2)
        found.append(open_checkpoint(farm.root / str(size)))
    assert len({len(opened.files) for opened in found}) == 3
    for name in found[0].tensors:
        assert all(torch.equal(opened.read(name), found[0].read(name)) for opened in found)


def test_an_executor_that_does_not_exist(farm: Farm) -> None:
    with pytest.raises(InputError, match="no executor 'rey'") as caught:
        run(farm.request(), executor="rey")
    assert "serial, threads, ray" in caught.value.hint
    with pytest.raises(InputError, match="serial executor has one thread, 4 are asked for"):
        run(farm.request(), executor="serial", threads=4)


def test_without_ray_it_says_what_to_install(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="needs the ray package") as caught:
        resafe.fuse(farm.root / "base", [farm.root / "tuned1"], out=farm.root / "out", executor="ray")
    assert caught.value.hint == "pip install 'resafe[ray]'"
    assert not (farm.root / "out").exists()


def test_no_cluster_at_an_address_is_said_at_once(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(InputError, match=r"no Ray cluster at 127\.0\.0\.1:1 .*refused") as caught:
        run(farm.request(), executor="ray", ray_address="127.0.0.1:1")
    assert "ray start --head" in caught.value.hint


class TestTasks:
    """What a worker does, without Ray around it."""

    @pytest.fixture
    def job(self, farm: Farm) -> Iterator[Job]:
        request = farm.request(method="ties", max_shard_size=1500)
        plan = build_plan(request)
        stage = stage_of(request.out)
        with entered(stage, plan.digest, 0, 1):
            yield Job(request, plan.digest, Path.cwd(), stage.path, 1)

    def test_a_task_leaves_its_summary_and_its_receipt_in_the_directory(self, job: Job) -> None:
        assert summary_task(job, 2, 0, {}) is None
        assert (job.stage / "round-0" / "2.safetensors").is_file()
        receipt = file_task(job, 2, {"thresholds": [0.1, 0.1]})
        assert isinstance(receipt, Receipt)
        assert read_receipt(job.stage / f"{receipt.file}.receipt", job.digest) == receipt
        assert (job.stage / receipt.file).stat().st_size == receipt.nbytes

    def test_relative_paths_start_where_the_job_was_started(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        root = job.request.out.parent
        monkeypatch.chdir(root)
        here = replace(job.request, base="base", models=(Input("tuned1", "a"), Input("tuned2", "b")), out=Path("out"))
        local = Job(here, build_plan(here).digest, root, job.stage, 1)
        monkeypatch.chdir("/")
        assert isinstance(file_task(local, 0, {"thresholds": [0.1, 0.1]}), Receipt)
        assert Path.cwd() == Path("/")

    def test_a_node_that_sees_something_else_says_so(self, job: Job) -> None:
        for wrong, says in (
            (replace(job, directory=Path("/no/such")), "/no/such: is not on"),
            (replace(job, stage=Path("/no/stage")), "/no/stage: is not on"),
            (replace(job, digest="0" * 64), "sees other inputs"),
        ):
            for found in (summary_task(wrong, 0, 0, {}), file_task(wrong, 0, {"thresholds": [0.1, 0.1]})):
                assert isinstance(found, InputError) and says in found.message


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory; a file in it makes the next worker that writes fail: "kill", "full" or "bug"."""
    return tmp_path_factory.mktemp("trap")


def sabotage(trap: Path) -> Callable[[], None]:
    """What a worker does first: its writing falls into the trap. A closure, so that it travels by value."""

    def prepare() -> None:
        from resafe.engine import unit

        write = unit._write

        def dangerous(descriptor: int, data: Any, offset: int) -> int:
            if (trap / "kill").exists():
                (trap / "kill").rename(trap / "killed")
                os.kill(os.getpid(), signal.SIGKILL)
            if (trap / "full").exists():
                with (trap / "full").open("a") as calls:
                    calls.write("x")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if (trap / "bug").exists():
                with (trap / "bug").open("a") as calls:
                    calls.write("x")
                raise ZeroDivisionError("a bug")
            return write(descriptor, data, offset)

        unit._write = dangerous

    return prepare


@pytest.fixture(scope="module")
def cluster(trap: Path) -> Iterator[Any]:
    """Ray on this machine with two cores, and nothing beside it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="ray is not installed")
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False,
        logging_level="ERROR", runtime_env={"worker_process_setup_hook": sabotage(trap)},
    )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.mark.slow
class TestRay:
    """Ray takes seconds to start."""

    @pytest.mark.parametrize("method", METHODS)
    def test_the_same_files_as_serial(self, farm: Farm, cluster: Any, method: str) -> None:
        run(asked(farm, "serial", method), executor="serial")
        ticks: list[tuple[str, int, int]] = []
        outcome = run(asked(farm, "ray", method), executor="ray", progress=lambda *tick: ticks.append(tick))
        assert outcome.committed and outcome.redone == len(outcome.receipts) > 3
        assert files(farm.root / "ray") == files(farm.root / "serial")
        passes = 3 if method == "ties" else 1
        assert len(ticks) == passes * len(outcome.receipts)
        assert all(done == total for _, done, total in ticks[len(outcome.receipts) - 1 :: len(outcome.receipts)])

    def test_a_killed_worker_is_replaced(self, farm: Farm, cluster: Any, trap: Path) -> None:
        run(asked(farm, "serial", "ties"), executor="serial")
        (trap / "kill").touch()
        assert run(asked(farm, "ray", "ties"), executor="ray").committed
        assert (trap / "killed").exists()
        assert files(farm.root / "ray") == files(farm.root / "serial")

    def test_a_full_disk_is_said_once_and_a_later_run_goes_on(self, farm: Farm, cluster: Any, trap: Path) -> None:
        (trap / "full").touch()
        with pytest.raises(ResafeError, match="No space left on device") as caught:
            run(asked(farm, "ray", "dare", 10**6), executor="ray")
        assert caught.value.hint == "make room and run again; finished files are kept"
        assert (trap / "full").read_text() == "x"  # one file, tried once
        (trap / "full").unlink()
        assert not (farm.root / "ray").exists()
        assert run(asked(farm, "ray", "dare", 10**6), executor="ray").committed

    def test_what_nobody_foresaw_is_tried_again_and_then_told(self, farm: Farm, cluster: Any, trap: Path) -> None:
        (trap / "bug").touch()
        with pytest.raises(ResafeError, match=r"model.safetensors: its Ray task failed 4 times.*a bug"):
            run(asked(farm, "ray", "dare", 10**6), executor="ray")
        assert (trap / "bug").read_text() == "xxxx"
        (trap / "bug").unlink()

    def test_a_run_goes_on_from_the_receipts_of_another_executor(self, farm: Farm, cluster: Any) -> None:
        request = asked(farm, "ray", "ties")
        finished = 0

        def stop(what: str, done: int, total: int) -> None:
            nonlocal finished
            finished += what == "fuse"
            if finished == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(request, executor="ray", progress=stop)
        outcome = run(request, executor="serial")
        assert outcome.committed and outcome.redone <= len(outcome.receipts) - 2
        run(asked(farm, "serial", "ties"), executor="serial")
        assert files(farm.root / "ray") == files(farm.root / "serial")

    def test_a_damaged_input_says_the_same_as_with_threads(self, farm: Farm, cluster: Any) -> None:
        run(farm.request("first"), executor="serial")
        path = sorted((farm.root / "first").glob("*.safetensors"))[0]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        said = []
        for executor in ("threads", "ray"):
            models = (Input(str(farm.root / "first"), "a"),)
            with pytest.raises(InputError) as caught:
                run(farm.request(executor, models=models), executor=executor)
            said.append(str(caught.value))
        assert said[0] == said[1] and f"{path.name} is damaged" in said[0]

    def test_a_wrong_setting_says_the_same_as_with_threads(self, farm: Farm, cluster: Any) -> None:
        said = []
        for executor in ("threads", "ray"):
            with pytest.raises(InputError) as caught:
                run(farm.request(executor, method="dare", settings={"drop": 1.0}), executor=executor)
            said.append((caught.value.message, caught.value.hint))
        assert said[0] == said[1] and "DARE cannot drop" in said[0][0]

    def test_a_task_that_fits_no_node_does_not_wait_for_one(self, farm: Farm, cluster: Any) -> None:
        with pytest.raises(InputError, match="64 threads fits no Ray node: the largest has 2 cores"):
            run(farm.request(), executor="ray", threads=64)

    def test_the_command_line(self, farm: Farm, cluster: Any) -> None:
        recipe = farm.root / "fuse.yaml"
        models = [str(farm.root / "tuned1"), str(farm.root / "tuned2")]
        recipe.write_text(yaml.safe_dump({"base": str(farm.root / "base"), "models": models, "method": "ties"}))
        for executor in ("serial", "ray"):
            out = str(farm.root / executor)
            done = CliRunner().invoke(app, ["fuse", str(recipe), "--out", out, "--executor", executor, "--quiet"])
            assert done.exit_code == 0, done.output
        assert files(farm.root / "ray") == files(farm.root / "serial")
