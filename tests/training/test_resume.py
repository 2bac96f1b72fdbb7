"""A run that is really killed goes on from its checkpoint and ends with the same adapter, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from resafe.training import LoraSettings, SftSettings, TrainingResult, train_sft
from resafe.training.work import checked_work_directory, last_checkpoint, remove_work, work_directory

from .conftest import make_model, make_tokenizer
from .test_sft import EXAMPLES

CHILD = """
import sys, time
from pathlib import Path
from tests.training.test_resume import train
def slow(step, total, metrics):
    print(step, flush=True)
    if step >= 8:
        time.sleep(60)
train(Path(sys.argv[1]), slow)
"""


def train(out: Path, progress: Any = None, **changes: Any) -> TrainingResult:
    """Ten steps over 20 examples in batches of 6, so with passes that end inside a batch; a checkpoint every 3."""
    settings = SftSettings(
        **{"steps": 10, "batch_size": 6, "learning_rate": 1e-2, "save_every": 3, "device": "cpu", **changes}
    )
    return train_sft(
        model=make_model(),
        tokenizer=make_tokenizer(),
        examples=EXAMPLES,
        settings=settings,
        out=out,
        system="",
        lora=LoraSettings(rank=4, dropout=0.1),  # dropout: the random state must come back too
        progress=progress,
    )


@pytest.mark.slow
def test_killed_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=root,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "8":
            break
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    work = tmp_path / "a.work"
    assert sorted(item.name for item in work.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert not (tmp_path / "a").exists()

    resumed = train(tmp_path / "a")
    whole = train(tmp_path / "b")
    assert (resumed.resumed_from, whole.resumed_from) == (6, 0)
    assert resumed.losses == whole.losses
    assert len(whole.losses) == 10
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert not work.exists()
    assert 0 < resumed.tokens < whole.tokens


class Stop(Exception):
    """Ends a run from inside."""


def stop_at(step: int) -> Any:
    def progress(now: int, total: int, metrics: dict[str, float]) -> None:
        if now == step:
            raise Stop

    return progress


def test_checkpoint_cut_short_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tmp_path / "a", stop_at(8))
    newest = tmp_path / "a.work" / "checkpoint-6" / "trainer_state.json"
    newest.write_text(newest.read_text()[:50])
    assert train(tmp_path / "a").resumed_from == 3
    assert not (tmp_path / "a.work").exists()


def test_other_settings_start_afresh(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tmp_path / "a", stop_at(5))
    changed = train(tmp_path / "a", learning_rate=5e-3)
    assert changed.resumed_from == 0
    assert changed.losses == train(tmp_path / "b", learning_rate=5e-3).losses
    result = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(Stop):
        train(tmp_path / "a", stop_at(5))
    # what was there stays until the next run is done
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == result
    train(tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() != result


def test_work_directory_of_another_run_is_cleared(tmp_path: Path) -> None:
    work = tmp_path / "w"
    (work / "checkpoint-4").mkdir(parents=True)
    (work / "checkpoint-4" / "trainer_state.json").write_text(json.dumps({"global_step": 4}))
    (work / "run.json").write_text(json.dumps({"identity": "mine"}))
    assert last_checkpoint(work, "mine") == work / "checkpoint-4"
    assert last_checkpoint(work, "other") is None
    assert not (work / "checkpoint-4").exists()
    (work / "run.json").write_text("not json")
    assert last_checkpoint(work, "other") is None
    assert json.loads((work / "run.json").read_text()) == {"identity": "other"}


def test_a_work_directory_whose_removal_was_killed_is_still_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json may be gone while checkpoints are left: the same command goes on."""
    work = work_directory(tmp_path / "out")
    last_checkpoint(work, "mine")
    (work / "checkpoint-4").mkdir()
    (work / "checkpoint-4" / "weights").write_text("gigabytes")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            remove_work(work)
    (work / "run.json").unlink(missing_ok=True)
    assert checked_work_directory(tmp_path / "out") == work
    assert last_checkpoint(work, "mine") is None and not (work / "checkpoint-4").exists()
    remove_work(work)
    assert not work.exists()
