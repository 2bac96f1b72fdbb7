"""Safety of models on question sets: answers that are made once, judges by name, rates with intervals."""

from __future__ import annotations

from resafe.evals.safety.questions import Asked, ask_sets
from resafe.evals.safety.result import Answer, SafetyResult
from resafe.evals.safety.run import evaluate_safety
from resafe.evals.safety.settings import SafetySettings
from resafe.evals.safety.subjects import Subject, subjects

__all__ = ["Answer", "Asked", "SafetyResult", "SafetySettings", "Subject", "ask_sets", "evaluate_safety", "subjects"]
