"""Kills, full disks, damaged inputs, two processes at once: nothing half done is ever taken for done."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from resafe.checkpoints import open_checkpoint
from resafe.engine import Input, build_plan, execute, unit, verify
from resafe.engine.stage import entered, stage_of
from resafe.errors import InputError, ResafeError

from .conftest import Farm

SLOW = """
import sys, time
from pathlib import Path
from resafe.engine import unit, build_plan, execute, Input, Request
write = unit._write
def slow(descriptor, data, offset):
    time.sleep(0.002)
    return write(descriptor, data, offset)
unit._write = slow
root = Path(sys.argv[1])
models = (Input(str(root / "tuned1"), "a"), Input(str(root / "tuned2"), "b"))
print("ready", flush=True)
execute(build_plan(Request(str(root / "base"), models, root / "out", "ties", max_shard_size=1500)), threads=2)
"""


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors*")}


@pytest.mark.slow
def test_twenty_kills_leave_the_undisturbed_bits(farm: Farm) -> None:
    script, out = farm.root / "slow.py", farm.root / "out"
    script.write_text(SLOW)
    execute(build_plan(farm.request("whole", method="ties", max_shard_size=1500)), threads=1)
    stage, rng, kept, kills = stage_of(out).path, random.Random(0), dict[str, int](), 0
    while kills < 20:
        process = subprocess.Popen([sys.executable, str(script), str(farm.root)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if out.exists():  # it was committed before the signal came: begin again
            assert files(out) == files(farm.root / "whole")
            for path in (out, stage):
                shutil.rmtree(path, ignore_errors=True)
            kept = {}
            continue
        for name, stamp in kept.items():  # what was finished before this run was not written again
            assert (stage / name).stat().st_mtime_ns == stamp
        kept = {path.stem: (stage / path.stem).stat().st_mtime_ns for path in stage.glob("*.receipt")}
    outcome = execute(build_plan(farm.request("out", method="ties", max_shard_size=1500)), threads=2)
    assert outcome.committed and outcome.redone == len(outcome.receipts) - len(kept)
    assert files(out) == files(farm.root / "whole")
    assert all(not check.problems for check in verify(out))


def test_a_full_disk_is_said_and_finished_files_stay(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve, room = unit._reserve, [3]

    def full(descriptor: int, nbytes: int) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, nbytes)

    monkeypatch.setattr(unit, "_reserve", full)
    request = farm.request(max_shard_size=1500)
    with pytest.raises(ResafeError, match="No space left") as caught:
        execute(build_plan(request), threads=2)
    assert "make room and run again" in (caught.value.hint or "")
    assert not (farm.root / "out").exists()
    monkeypatch.setattr(unit, "_reserve", reserve)
    outcome = execute(build_plan(request), threads=2)
    assert outcome.committed and outcome.redone == len(outcome.receipts) - 3


def test_no_room_is_found_before_anything_is_written(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10})())
    with pytest.raises(InputError, match="the disk has"):
        execute(build_plan(farm.request()), threads=1)
    assert not list(farm.root.glob("**/*.partial"))


def test_a_truncated_shard_is_named_before_reading(farm: Farm) -> None:
    shard = next((farm.root / "tuned2").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(InputError, match=shard.name):
        build_plan(farm.request())


def test_a_shard_cut_after_planning_is_named_while_reading(farm: Farm) -> None:
    plan = build_plan(farm.request())
    shard = farm.root / "tuned1" / "model.safetensors"
    os.truncate(shard, 3000)
    with pytest.raises(InputError, match=r"ends inside tensor"):
        execute(plan, threads=1)
    assert not (farm.root / "out").exists()


def test_a_flipped_byte_in_what_resafe_wrote_is_found(farm: Farm) -> None:
    execute(build_plan(farm.request("first")), threads=1)
    path = sorted((farm.root / "first").glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (check,) = [c for c in verify(farm.root / "first") if c.problems]
    assert check.receipt.file == path.name and "SHA-256 differs" in check.problems[0]
    with pytest.raises(InputError, match=f"{path.name} is damaged"):
        execute(build_plan(farm.request(models=(Input(str(farm.root / "first"), "a"),))), threads=1)
    assert not (farm.root / "out").exists()
    path.unlink()
    assert "is missing" in next(c for c in verify(farm.root / "first") if c.problems).problems[0]


def test_a_flipped_byte_in_the_hubs_cache_is_found(farm: Farm) -> None:
    import hashlib

    blob = farm.root / "tuned1" / "model.safetensors"
    digest = hashlib.sha256(blob.read_bytes()).hexdigest()
    (farm.root / "blobs").mkdir()
    stored = farm.root / "blobs" / digest
    blob.rename(stored)
    blob.symlink_to(stored)
    assert execute(build_plan(farm.request()), threads=1).committed
    data = bytearray(stored.read_bytes())
    data[-3] ^= 4
    stored.write_bytes(data)
    with pytest.raises(InputError, match="is damaged"):
        execute(build_plan(farm.request("again")), threads=1)


def test_two_processes_on_one_directory(farm: Farm) -> None:
    plan = build_plan(farm.request())
    with entered(stage_of(farm.root / "out"), plan.digest, 0, 1), pytest.raises(InputError, match="another resafe"):
        execute(plan, threads=1)
    with entered(stage_of(farm.root / "out"), "other plan", 0, 1), pytest.raises(InputError, match="another resafe"):
        execute(build_plan(farm.request()), threads=1)
    assert execute(build_plan(farm.request()), threads=1).committed


def test_another_plan_takes_nothing_over(farm: Farm) -> None:
    request = farm.request(max_shard_size=1500)
    plan = build_plan(request)
    stage = stage_of(farm.root / "out")
    with entered(stage, plan.digest, 0, 1):
        (stage.path / "left").write_text("from an earlier plan")
    outcome = execute(build_plan(farm.request(method="dare", max_shard_size=1500)), threads=1)
    assert outcome.redone == len(outcome.receipts)
    assert not (farm.root / "out" / "left").exists()


def test_a_directory_that_is_not_ours_is_left_alone(farm: Farm) -> None:
    (farm.root / "out").mkdir()
    (farm.root / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="resafe did not write it"):
        execute(build_plan(farm.request()), threads=1)
    assert (farm.root / "out" / "thesis.txt").read_text() == "precious"


@pytest.mark.slow
def test_the_command_line(farm: Farm, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "resafe", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    file = tmp_path / "fuse.yaml"
    content = {"base": str(farm.root / "base"), "models": [str(farm.root / "tuned1"), str(farm.root / "tuned2")]}
    file.write_text(yaml.safe_dump({**content, "method": "ties", "settings": {"keep": 0.5}}))
    shown = run("plan", file)
    assert shown.returncode == 0, shown.stderr
    assert "8 matched by name, 7 fused, 1 unchanged" in shown.stdout and "3 passes" in shown.stdout
    done = run("fuse", file, "settings.keep=0.25", "--out", tmp_path / "fused")
    assert done.returncode == 0, done.stderr
    assert "keep: 0.25" in (tmp_path / "fused" / "README.md").read_text()
    assert run("verify", tmp_path / "fused").returncode == 0
    wrong = run("fuse", file, "metod=ties", "--out", tmp_path / "x")
    assert wrong.returncode == 2 and "did you mean 'method'" in wrong.stderr
    missing = run("fuse", file)
    assert missing.returncode == 2 and "give --out" in missing.stderr
    save_file({"w": torch.zeros(2)}, tmp_path / "fused" / "extra.safetensors")
    shard = sorted((tmp_path / "fused").glob("model-*.safetensors"))[0]
    os.truncate(shard, 100)
    broken = run("verify", tmp_path / "fused")
    assert broken.returncode == 1 and "100 bytes" in broken.stdout
    with pytest.raises(InputError):
        open_checkpoint(tmp_path / "fused")
