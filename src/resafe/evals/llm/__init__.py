"""Language models as judges, over any endpoint that speaks OpenAI's chat-completions protocol."""

from __future__ import annotations

from resafe.evals.llm.budget import Estimate
from resafe.evals.llm.pairwise import Preference, preference

__all__ = ["Estimate", "Preference", "preference"]
