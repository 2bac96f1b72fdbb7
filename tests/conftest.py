"""What several rooms share: the laboratory of tiny checkpoints, and a tiny recipe that is run once."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish() -> None:
    """What was imported stays: collecting cycles, which every stage of a recipe does, need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoints of `tests.tiny`, made once."""
    from tests.tiny import build

    return build(tmp_path_factory.mktemp("lab"))


class Recorder:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ticks: list[tuple[str, int, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def bar(self, label: str, unit: str) -> Any:
        return lambda done, total, figures: self.ticks.append((label, done, total))


@dataclass(frozen=True)
class TinyRun:
    """A finished run: its model, its recipe as plain values, its directory, its outcome and what it reported."""

    model: Path
    raw: dict[str, Any]
    root: Path
    outcome: Any
    reporter: Recorder = field(repr=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    from resafe.recipe import check_recipe, run_recipe
    from tests.recipe.tiny import save_chat_model, tiny_recipe

    place = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESAFE_CACHE", str(place / "cache"))
        raw, reporter = tiny_recipe(save_chat_model(place / "model")), Recorder()
        outcome = run_recipe(check_recipe(raw, "tiny"), place / "run", reporter)
    return TinyRun(place / "model", raw, place / "run", outcome, reporter)
