"""The gradient selector: remove the entries of the task vectors whose removal helps safety most, at no cost elsewhere.

A mask without training: the first-order scores of `resafe.realign.scores`, cut at a share.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from resafe.masks import MaskSettings
from resafe.masks.concrete import Granularity
from resafe.realign.base import Family, Problem, Realigned, realign_method
from resafe.realign.mask_family import mask_family
from resafe.realign.scores import encoded_items, masked_model, removal_mask, removal_scores, turned, with_head_size


@realign_method("selector", title="Gradient selector", source="this project (first-order removal score)", trains=True)
def selector(
    problem: Problem,
    *,
    granularity: Granularity = "entry",
    examples: int = 48,
    answer_tokens: int | None = 4,
    shares: tuple[float, ...] = (0.01, 0.015, 0.02),
    path: bool = True,
    fisher: bool = False,
    per_task: bool = False,
) -> Family:
    """Removes the entries with the highest ∂L_safety/∂m at m = 1, among those whose removal hurts no other side.

    A first-order score holds near the point where it was taken, and a deep attack is far from it: with `path`, each
    share of the grid starts from the mask of the one before, with scores taken anew there, on the next examples.

    Args:
        problem: The realignment; needs pairs and a model.
        granularity: What is removed together.
        examples: Items of each side for one set of scores, taken in order.
        answer_tokens: Tokens of the pairs' answers that count: whether to refuse is decided in the first few.
        shares: Grid of the removed share.
        path: Take scores anew for each share, not once for all.
        fisher: Scores to second order, with the diagonal of the empirical Fisher matrix: an entry on which a side's
            loss hangs is spared even where its first derivative is small. One backward pass an example.
        per_task: Of several tuned models each has its own entries removed; else an entry is removed from all.
    """
    settings = with_head_size(
        MaskSettings(granularity=granularity, sampling="direct", initial=1.0, per_task=per_task), problem
    )
    model, logits = masked_model(problem, settings, problem.seed)
    items, pad_id = encoded_items(problem, answer_tokens)
    grid = tuple(sorted(shares))
    masks: dict[float, dict[str, Tensor]] = {}
    mask = {key: torch.ones_like(value) for key, value in logits.values.items()}
    scores: dict[str, Tensor] = {}
    for number, share in enumerate(grid):
        if path or not scores:
            logits.start_from(settings, mask)
            few = turned(items, number * examples)
            scores = removal_scores(model, logits, few, examples, pad_id, problem.progress, fisher=fisher)
        mask = masks[share] = removal_mask(scores, share, mask)

    def at(share: float) -> Realigned:
        plain = replace(settings, sampling="deterministic", initial=0.0)
        return mask_family(problem, logits.masks_of(masks[share], plain), (1.0,)).at(1.0)

    return Family("removed share", grid, at, {"entries": sum(score.numel() for score in scores.values())})
