"""What Inspect finds through the entry point `inspect_ai`: our provider, tasks and scorers."""

from __future__ import annotations

from resafe.evals.provider import LocalModel
from resafe.evals.public_tasks import TASKS
from resafe.evals.scorers import exact_scorer, refusal_scorer
from resafe.evals.tasks import harmful, harmless, utility

__all__ = ["TASKS", "LocalModel", "exact_scorer", "harmful", "harmless", "refusal_scorer", "utility"]
