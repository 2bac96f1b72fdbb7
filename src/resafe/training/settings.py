"""What a training run can be told. Knows no library of training: importing this loads neither torch nor TRL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from resafe.errors import InputError

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
DEVICES = ("auto", "cpu", "cuda")
AUTOCAST = ("auto", "bfloat16", "off")


class Progress(Protocol):
    """Called after each step with the step, the number of steps, and figures such as `loss`."""

    def __call__(self, step: int, total: int, metrics: dict[str, float], /) -> None:
        """Takes one report."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A fresh LoRA adapter (Hu et al. 2021, arXiv:2106.09685); the update is scaled by `alpha / rank`.

    Attributes:
        rank: Rank of each update.
        alpha: Scale numerator; None means twice the rank.
        targets: "all-linear" (all linear layers but the head), or the names of modules.
        dropout: Dropout before the adapter.
    """

    rank: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        _require(self.rank >= 1, "rank", self.rank, "1 or more")
        _require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "above 0")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "0 or more and below 1")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What SFT and DPO have in common. Give `steps` or `epochs`, not both.

    Attributes:
        steps: Optimizer steps.
        epochs: Passes over the data, rounded up to whole steps.
        learning_rate: Peak learning rate of AdamW.
        batch_size: Examples (or pairs) of one optimizer step, over all processes.
        micro_batch_size: Examples of one forward pass, must divide the batch; None takes the batch at once.
        max_tokens: Longer sequences lose the end of their answer; those without any answer left are dropped.
        warmup_steps: Steps of linear warm-up; at most half of all steps are used for it.
        schedule: "cosine", "linear", "constant" or "constant_with_warmup".
        weight_decay: Decoupled weight decay.
        max_grad_norm: Clip the gradient's norm; 0 leaves it.
        gradient_checkpointing: Save memory, about a quarter slower.
        save_every: Steps between checkpoints that a killed run goes on from; 0 for none.
        seed: Decides the order of the data, a fresh adapter's start, and dropout.
        device: "cpu" (weights as they come), "cuda" (bfloat16 autocast over them), "auto": CUDA where there is one.
        autocast: "auto": bfloat16 products on CUDA, and on a CPU if weights are bfloat16; "bfloat16": also over float32
            weights (which stay float32, so that small updates are not lost); "off".
        report_to: Trackers that get the figures of each step, by their names in transformers ("wandb", "tensorboard").
    """

    steps: int | None = None
    epochs: float | None = None
    learning_rate: float = 2e-4
    batch_size: int = 16
    micro_batch_size: int | None = None
    max_tokens: int = 512
    warmup_steps: int = 10
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    save_every: int = 50
    seed: int = 0
    device: str = "auto"
    autocast: str = "auto"
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if (self.steps is None) == (self.epochs is None):
            raise InputError("training needs either 'steps' or 'epochs'", "give one of the two")
        _require(self.steps is None or self.steps >= 1, "steps", self.steps, "1 or more")
        _require(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "above 0")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        micro = self.micro_batch_size
        _require(
            micro is None or (micro >= 1 and self.batch_size % micro == 0),
            "micro_batch_size",
            micro,
            f"a divisor of the batch size {self.batch_size}",
        )
        _require(self.max_tokens >= 2, "max_tokens", self.max_tokens, "2 or more")
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        _require(self.autocast in AUTOCAST, "autocast", self.autocast, f"one of {', '.join(AUTOCAST)}")
        _require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")

    def total_steps(self, examples: int) -> int:
        """Optimizer steps for that many examples."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(examples * (self.epochs or 0) / self.batch_size))


@dataclass(frozen=True, kw_only=True)
class SftSettings(TrainSettings):
    """Supervised fine-tuning: the mean negative log-likelihood of a batch's answer tokens.

    Attributes:
        max_answer_tokens: Only this many tokens of each answer are learnt, and the rest is not computed; None for all.
            Whether to refuse is decided in the first few.
        whole_share: Share of the examples, evenly spread, whose answers are not cut: a model that learns openings only
            forgets how to go on from them.
        packing: Lay the examples of a forward pass end to end in one row, where each sees itself alone: no padding, and
            the same losses. Batches still count examples.
    """

    max_answer_tokens: int | None = None
    whole_share: float = 0.0
    packing: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        cut = self.max_answer_tokens
        _require(cut is None or cut >= 1, "max_answer_tokens", cut, "1 or more, or none")
        _require(0 <= self.whole_share <= 1, "whole_share", self.whole_share, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class DpoSettings(TrainSettings):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290), sigmoid loss.

    Attributes:
        beta: Strength of the pull towards the reference, the model as it was given.
    """

    learning_rate: float = 5e-5
    beta: float = 0.1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        _require(self.beta > 0, "beta", self.beta, "above 0")


@dataclass(frozen=True)
class TrainingResult:
    """A finished training run.

    Attributes:
        path: The adapter or model directory that was written.
        model: The trained model, in memory, in evaluation mode (a PeftModel for adapters).
        steps: Optimizer steps of the whole run.
        losses: The loss of each step, also of the steps before a resume.
        tokens: Tokens (without padding) that this process trained on.
        seconds: Time this process trained, without loading and saving.
        resumed_from: The step this process went on from; 0 for a fresh start.
        dropped: Examples left out because `max_tokens` left no answer.
    """

    path: Path
    model: Any
    steps: int
    losses: tuple[float, ...]
    tokens: int
    seconds: float
    resumed_from: int
    dropped: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of training in this process."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise InputError(f"training setting '{name}' is {value!r}", f"it must be {allowed}")
