"""Stages: a receipt only after success, another digest another directory, one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resafe.errors import InputError
from resafe.recipe.stage import Run, locked, write_json


def run_at(root: Path) -> tuple[Run, list[str]]:
    lines: list[str] = []
    return Run(root, lines.append), lines


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    run, lines = run_at(tmp_path)
    first = run.stage("align", {"seed": 0}, lambda path: calls.append(path) or {"tokens": 7})  # type: ignore[func-returns-value]
    again, more = run_at(tmp_path)
    second = again.stage("align", {"seed": 0}, lambda path: calls.append(path))
    assert calls == [first.path]
    assert second == first
    assert (run.redone, again.redone) == (1, 0)
    assert lines[0] == "align …"
    assert more == ["align is already done"]
    receipt = first.receipt
    assert receipt is not None
    assert (receipt["stage"], receipt["digest"], receipt["facts"]) == ("align", first.digest, {"tokens": 7})
    assert first.path.name == f"align-{first.digest[:12]}"


def test_another_dependence_is_another_stage(tmp_path: Path) -> None:
    run, _ = run_at(tmp_path)
    stages = [run.stage(name, depends, lambda path: None) for name, depends in (("a", 1), ("a", 2), ("b", 1))]
    assert len({stage.path for stage in stages}) == 3
    assert run.redone == 3


def test_a_failed_stage_leaves_no_receipt_but_its_work_and_its_time(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        (path / "checkpoint").write_text("half")
        time.sleep(0.06)
        raise RuntimeError("no")

    found: list[str] = []

    def goes_on(path: Path) -> None:
        found.append((path / "checkpoint").read_text())
        time.sleep(0.06)

    for _ in range(2):
        with pytest.raises(RuntimeError):
            run_at(tmp_path)[0].stage("x", 0, fails)
    assert not list(tmp_path.rglob("receipt.json"))
    run, _ = run_at(tmp_path)
    stage = run.stage("x", 0, goes_on)
    assert found == ["half"]
    assert stage.receipt is not None
    assert stage.receipt["seconds"] >= 0.18  # two failed attempts and the last
    assert run.seconds() == stage.receipt["seconds"]
    assert run.peak_memory_gb() == stage.receipt["peak_memory_gb"] > 0.005


@pytest.mark.parametrize("content", ["", "{", '{"digest": "other"}'])
def test_a_receipt_that_is_not_the_stages_own_counts_for_nothing(tmp_path: Path, content: str) -> None:
    stage = run_at(tmp_path)[0].stage("x", 0, lambda path: None)
    (stage.path / "receipt.json").write_text(content)
    run, _ = run_at(tmp_path)
    run.stage("x", 0, lambda path: None)
    assert run.redone == 1


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_directory_is_one_processes_and_free_again_when_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from resafe.recipe.stage import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another resafe process is at work") as caught, locked(tmp_path / "run"):
            pass
        assert "--out" in caught.value.hint
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path / "run"):
        pass


def test_room_is_needed_only_while_there_is_something_to_do(tmp_path: Path) -> None:
    run_at(tmp_path)[0].stage("a", 1, lambda path: None)
    full = Run(tmp_path, lambda line: None, room=1 << 60)
    full.stage("a", 1, lambda path: None)
    with pytest.raises(InputError, match="free"):
        full.stage("b", 1, lambda path: None)
    assert not (tmp_path / "stages").joinpath("b").exists()
