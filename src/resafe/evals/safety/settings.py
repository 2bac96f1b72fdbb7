"""What an evaluation of safety asks, how it decodes, who judges. Loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from resafe.checkpoints.precision import Precision
from resafe.errors import InputError
from resafe.evals.generation import BatchSize
from resafe.evals.sampling import Sampling
from resafe.evals.wrappers import WRAPPERS


@dataclass(frozen=True)
class SafetySettings:
    """Settings of an evaluation of safety.

    Attributes:
        sets: Question sets: shipped, registered, or a user's .jsonl, .json or .csv file.
        harmless: Sets whose questions are harmless, whatever they say themselves; refusing these is over-refusal.
        wrappers: Red-team wrappers; each set is asked in each. Harmless sets are asked as they are only.
        judges: Registered judges.
        judge_settings: `setting=value`, or `judge.setting=value` where there are several judges.
        max_cost: Money that each judge with a price may spend.
        limit: Only so many questions of each set, evenly over topics.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 is greedy; else with `top_k`, `top_p` and `seed` as in `Sampling`.
        system: System turn: None for the template's default, "" for an empty one.
        data_dir: Directory of the public sets' files; None loads from the Hub.
        dtype: Precision of local models' weights.
        device: Where local models go.
        batch_size: Prompts that are decoded together; "auto" measures.
        store: Directory of stored responses; None is in resafe's cache.
        coherence: Checkpoint that measures the responses' perplexity, "first" for the first model, "none", or "auto":
            the first model where a judge measures harm and it is local.
        most_perplexity: A response of 12 tokens or more above it is broken; of 40 or more, above a tenth of it.
        connections: Most requests under way at an endpoint.
        corrected: Also give the rates corrected for the judges' errors, where they are calibrated.
    """

    sets: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ("none",)
    judges: tuple[str, ...] = ("refusal",)
    judge_settings: tuple[str, ...] = ()
    max_cost: float | None = None
    limit: int | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    system: str | None = None
    data_dir: Path | None = None
    dtype: Precision = "auto"
    device: str = "auto"
    batch_size: BatchSize = "auto"
    store: Path | None = None
    coherence: str = "auto"
    most_perplexity: float = 5000.0
    connections: int = 16
    corrected: bool = False

    def __post_init__(self) -> None:
        """Checks what can be checked without loading anything.

        Raises:
            InputError: A value out of range, or a wrapper that does not exist.
        """
        for name in self.wrappers:
            WRAPPERS.get(name)
        if not (self.sets or self.harmless) or not self.wrappers or not self.judges:
            raise InputError("no question sets, no wrappers or no judges", "for example: --sets catqa --judges refusal")
        if self.max_new_tokens < 1 or self.connections < 1 or (self.limit is not None and self.limit < 1):
            raise InputError(
                f"max_new_tokens {self.max_new_tokens}, limit {self.limit}, connections {self.connections}",
                "each must be at least 1",
            )
        if self.batch_size != "auto" and self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}", "give a number of prompts, at least 1, or auto")
        if self.temperature < 0:
            raise InputError(f"temperature is {self.temperature}", "0 is greedy, above it is sampled")
        if self.temperature:
            Sampling(self.temperature, self.top_k, self.top_p, self.seed)
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise InputError(f"{self.data_dir}: no such directory", "leave data_dir out to load from the Hub")
