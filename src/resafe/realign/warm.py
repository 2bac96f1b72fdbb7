"""Where a mask's logits start: at one constant, or from cheap scores of what to remove."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from resafe.errors import InputError
from resafe.masks import MaskLogits
from resafe.masks.batches import Item
from resafe.masks.checkpoint import load_state, save_state
from resafe.masks.concrete import collected
from resafe.masks.logits import gathered, held_here, placed_as, spread
from resafe.masks.losses import UNPADDED
from resafe.masks.processes import ALONE, Processes
from resafe.masks.reference import precision_of
from resafe.provenance import digest_value
from resafe.realign.base import Problem, models_digest
from resafe.realign.safety import SafetyVector, agreements
from resafe.realign.scores import removal_mask, removal_scores

WarmScores = Literal["gradient", "fisher", "magnitude", "sign_agreement"]
"""What says which entries start removed: first-order removal scores, or second-order ones with the Fisher diagonal; the
smallest entries; or those that go furthest against the safety vector (the last two need no pass through the model)."""


@dataclass(frozen=True)
class WarmStart:
    """Logits that start from removal scores instead of one constant.

    Attributes:
        share: Share of entries, those with the highest positive scores, that start removed.
        removed: Their logit.
        kept: The logit of all others.
        examples: Items of each side that the scores are computed on.
        scores: Which scores.
    """

    share: float = 0.02
    removed: float = -1.0
    kept: float = 3.0
    examples: int = 64
    scores: WarmScores = "gradient"


def warm_logits(scores: dict[str, Tensor], warm: WarmStart, processes: Processes = ALONE) -> dict[str, Tensor]:
    """Initial logits by key, sharded over processes as the scores are."""
    masks = removal_mask(scores, warm.share, processes=processes)
    return {
        key: placed_as(torch.where(held_here(mask) > 0.5, warm.kept, warm.removed), mask) for key, mask in masks.items()
    }


def warm_scores(
    problem: Problem,
    warm: WarmStart,
    model: Any,
    logits: MaskLogits,
    items: Sequence[Item],
    pad_id: int,
    safety: SafetyVector | None = None,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Removal scores by key, higher for what should start removed; sharded as the logits are.

    Those that take passes through the model are kept beside the training's checkpoints, so that a resumed run does not
    compute them again.

    Raises:
        InputError: "fisher" is asked of several processes, or "sign_agreement" without a safety vector.
    """
    if warm.scores == "magnitude":
        return _spread(magnitudes(logits, problem), logits)
    if warm.scores == "sign_agreement":
        if safety is None:
            raise InputError("warm_scores sign_agreement needs a safety vector", "give base: or unaligned:")
        return _spread({key: -value for key, value in agreements(logits, problem, safety).items()}, logits)
    if warm.scores == "fisher" and processes.world > 1:
        raise InputError("warm_scores fisher is computed by one process", "use gradient, or one process")
    return _stored(problem, warm, model, logits, items, pad_id, processes)


def magnitudes(logits: MaskLogits, problem: Problem) -> dict[str, Tensor]:
    """Max − mean |τ| of what shares a logit, positive: highest where the task vectors changed least.

    Zero where they changed nothing, so that nothing is spent on the removal of what is not there.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for task, vector in enumerate(problem.vectors):
        for name in logits.shapes:
            key = logits.key(name, task if logits.tasks > 1 else 0)
            size = vector.delta(name).abs()
            shape = tuple(logits.values[key].shape)
            for found, entries in ((sums, size), (counts, torch.ones_like(size))):
                part = collected(name, entries, shape, logits.settings)
                found[key] = found[key] + part if key in found else part
    means = {key: sums[key] / counts[key] for key in sums}
    highest = max(float(mean.max()) for mean in means.values())
    tiny = torch.finfo(torch.float32).tiny
    return {key: torch.where(mean > 0, highest - mean + tiny, 0.0) for key, mean in means.items()}


def _stored(
    problem: Problem, warm: WarmStart, model: Any, logits: MaskLogits, items: Sequence[Item], pad_id: int,
    processes: Processes,
) -> dict[str, Tensor]:  # fmt: skip
    path = problem.work / "scores.safetensors" if problem.work else None
    tokens = [(item.side, item.chosen.prompt, item.chosen.answer) for item in items]
    kind: list[str] = [] if warm.scores == "gradient" else [warm.scores]
    kind += ["unpadded"] if getattr(model, UNPADDED, False) else []
    models = [models_digest(problem), precision_of(model)]
    identity = digest_value([warm.examples, asdict(logits.settings), logits.vectors_digest, tokens, models, *kind])
    processes.wait()
    stored = load_state(path, identity) if path else None
    if not processes.agree(stored is not None):
        stored = removal_scores(
            model, logits, items, warm.examples, pad_id, problem.progress, processes, fisher=warm.scores == "fisher"
        )
        if path:
            held = {}
            for key, value in stored.items():  # all take part in gathering each one, and one process holds them
                score = gathered(value)
                if processes.main:
                    held[key] = score
            if processes.main:
                save_state(path, held, identity)
    assert stored is not None
    return _spread(stored, logits)


def _spread(scores: dict[str, Tensor], logits: MaskLogits) -> dict[str, Tensor]:
    """Scores that every process has whole, sharded as the logits are, one tensor at a time."""
    return {key: spread(scores.pop(key), logits.values[key]) for key in list(scores)}
