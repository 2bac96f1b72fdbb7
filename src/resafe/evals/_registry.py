"""What Inspect finds through the entry point `inspect_ai`: our provider, tasks, solver and scorers."""

from __future__ import annotations

from resafe.evals.asking import ask
from resafe.evals.provider import LocalModel
from resafe.evals.public_tasks import TASKS, questions
from resafe.evals.scorers import exact_scorer, judge_scorer, refusal_scorer
from resafe.evals.tasks import harmful, harmless, utility

__all__ = [
    "TASKS",
    "LocalModel",
    "ask",
    "exact_scorer",
    "harmful",
    "harmless",
    "judge_scorer",
    "questions",
    "refusal_scorer",
    "utility",
]
