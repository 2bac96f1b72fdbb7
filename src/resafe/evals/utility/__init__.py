"""Utility: the downstream tasks of lm-eval on models in memory, with or without a network, and items as records."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from resafe.evals.utility.names import TASKS, task_names
from resafe.evals.utility.results import TaskScore, UtilityResult

if TYPE_CHECKING:
    from resafe.evals.utility.run import evaluate_lm, evaluate_utility

__all__ = ["TASKS", "TaskScore", "UtilityResult", "evaluate_lm", "evaluate_utility", "task_names"]


def __getattr__(name: str) -> Any:
    if name not in ("evaluate_lm", "evaluate_utility"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.run"), name)
