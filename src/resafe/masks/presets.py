"""The presets of SOMF: `paper` reproduces the published algorithm, the others are this project's."""

from __future__ import annotations

from dataclasses import dataclass

from resafe.masks.concrete import Export, MaskSettings
from resafe.masks.train import TrainSettings


@dataclass(frozen=True)
class MaskPreset:
    """Mask, training and export that belong together.

    Attributes:
        mask: What shares a logit and how training forms the mask.
        training: Loss, steps, batches.
        export: What leaves training.
        warm_share: Share of the entries that first-order scores mark for removal at the start; 0 for none.
        warm_kept: The logit that all others then start from.
        answer_tokens: Tokens of the pairs' answers that count; None for all.
    """

    mask: MaskSettings
    training: TrainSettings
    export: Export
    warm_share: float = 0.0
    warm_kept: float = 3.0
    answer_tokens: int | None = None


PRESETS: dict[str, MaskPreset] = {
    # From the models and not from labels: the aligned one on the first tokens of the pairs' answers, where refusing is
    # decided, the tuned one on task examples; most of a batch are helpful answers, as over-refusal is the easy mistake.
    # Adam moves every entry's logit at one rate, those without a signal by the noise of the batches, which removes as
    # much as a random mask would; a price on removed entries holds those where they are, so that a few hundredths of
    # the entries are removed, those that refusals hang on.
    "default": MaskPreset(
        MaskSettings(initial=2.5),
        TrainSettings(
            loss="distill",
            steps=56,
            learning_rate=0.4,
            removal_price=1.0,
            shares={"safety": 0.25, "harmless": 0.5, "task": 0.25},
        ),
        "soft",
        warm_share=0.05,
        warm_kept=2.5,
        answer_tokens=6,
    ),
    # From the pairs' answers, at a third less: from near the tuned model (σ(1.5) = .82 of every entry kept), as a
    # little of everything gone makes refusals easy to bring back, and the examples decide where.
    "labels": MaskPreset(
        MaskSettings(initial=1.5),
        TrainSettings(steps=56, learning_rate=0.4, shares={"safety": 0.25, "harmless": 0.6, "task": 0.15}),
        "soft",
        answer_tokens=2,
    ),
    # The published code: sampled and rescaled, a randomly masked reference that is redrawn at every step, safety pairs
    # alone; its soft export is the last step's draw, its binary export one Bernoulli draw.
    "paper": MaskPreset(
        MaskSettings(sampling="relaxed", temperature=0.5, rescale="mean"),
        TrainSettings(loss="sigmoid", reference="random", shares={"safety": 1.0}, learning_rate=5e-3, warmup_steps=0),
        "last_draw",
    ),
}
"""Learning rates of the paper: 1e-3 (English) and 5e-3 (others) with adapters, 1e-2 for several tasks, for 500–900
steps of batch 16; a run of fewer steps needs a higher one in proportion, which its recipe states."""
