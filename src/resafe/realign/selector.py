"""The gradient selector: remove the entries of the task vectors whose removal helps safety most, at no cost elsewhere.

A mask without training: the first-order scores of `resafe.realign.scores`, cut at a share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from resafe.errors import InputError
from resafe.masks import Mask, MaskSettings
from resafe.masks.budget import LayerBudget, within_budget
from resafe.masks.concrete import Granularity
from resafe.masks.padding import check_padding
from resafe.realign.base import Family, Problem, Realigned, realign_method
from resafe.realign.mask_family import mask_family
from resafe.realign.safety import agreements, safety_vector
from resafe.realign.scores import encoded_items, masked_model, removal_mask, removal_scores, turned, with_head_size

LATER = ("conflict_only", "orthogonal", "layer_budget", "base", "unaligned", "scale")


@realign_method(
    "selector", title="Gradient selector", source="this project (first-order removal score)", trains=True, later=LATER
)
def selector(
    problem: Problem,
    *,
    granularity: Granularity = "entry",
    examples: int = 48,
    answer_tokens: int | Literal["all"] | None = 4,
    shares: tuple[float, ...] = (0.01, 0.015, 0.02),
    path: bool = True,
    fisher: bool = False,
    per_task: bool = False,
    conflict_only: bool = False,
    orthogonal: bool = False,
    layer_budget: LayerBudget | None = None,
    base: str | None = None,
    unaligned: str | None = None,
    scale: float = 0.0,
) -> Family:
    """Removes the entries with the highest ∂L_safety/∂m at m = 1, among those whose removal hurts no other side.

    A first-order score holds near the point where it was taken, and a deep attack is far from it: with `path`, each
    share of the grid starts from the mask of the one before, with scores taken anew there, on the next examples.

    Args:
        problem: The realignment; needs pairs and a model.
        granularity: What is removed together.
        examples: Items of each side for one set of scores, taken in order.
        answer_tokens: Tokens of the pairs' answers that count, "all" for all: whether to refuse is decided in the first
            few.
        shares: Grid of the removed share.
        path: Take scores anew for each share, not once for all.
        fisher: Scores to second order, with the diagonal of the empirical Fisher matrix: an entry on which a side's
            loss hangs is spared even where its first derivative is small. One backward pass an example.
        per_task: Of several tuned models each has its own entries removed; else an entry is removed from all.
        conflict_only: Only what goes against the safety vector is removed.
        orthogonal: Take the other sides' scores out of the safety scores, in place of sparing what they need.
        layer_budget: What of each layer is kept at least: a keep rate, or {"0-9": 1.0, "10-29": 0.9}.
        base: The model before alignment, for the safety vector aligned − base; an aligned adapter's own by default.
        unaligned: The aligned model after harmful tuning, for the safety vector aligned − unaligned.
        scale: What is left of the entries that are picked: 0 removes them, 0.5 halves them.

    Raises:
        InputError: `scale` is not from 0 to below 1, a share is none, `answer_tokens` is below 1, or a safety vector is
            given and not used.
    """
    if not 0 <= scale < 1:
        raise InputError(f"scale = {scale:g} is no part that is left", "give a number from 0 (removed) to below 1")
    scale = round(scale * 255) / 255  # as the mask is stored: scores are taken at the model that is measured
    settings = with_head_size(
        MaskSettings(granularity=granularity, sampling="direct", initial=1.0, per_task=per_task), problem
    )
    if isinstance(answer_tokens, int) and answer_tokens < 1:
        raise InputError(f"answer_tokens is {answer_tokens}", "give 1 or more, or all")
    items, pad_id = encoded_items(problem, None if answer_tokens == "all" else answer_tokens)
    if not conflict_only and (base or unaligned):
        raise InputError("base and unaligned are used by conflict_only", "set conflict_only, or leave them out")
    safety = safety_vector(problem, base, unaligned) if conflict_only else None
    found: dict[float, tuple[Mask, ...]] = {}
    kept: dict[float, dict[str, Tensor]] = {}
    plain = replace(settings, sampling="deterministic", initial=0.0)

    def cut(grid: Sequence[float]) -> int:
        """Adds masks of shares, each from that of the greatest share below it; gives the number of entries.

        The model with masks is gone afterwards: it is twice the model's size, and others are made and measured then.
        """
        model, logits = masked_model(problem, settings, problem.seed)
        check_padding(model, logits, items, pad_id)
        against = agreements(logits, problem, safety) if safety is not None else None
        scores: dict[str, Tensor] = {}
        for share in sorted(grid):
            if not 0 <= share <= 1:
                raise InputError(f"selector: {share:g} is no share of the entries", "give shares from 0 to 1")
            below = sorted(other for other in kept if other < share)
            mask = ones = {key: torch.ones_like(value) for key, value in logits.values.items()}
            if below:
                mask = {key: value.to(ones[key]) for key, value in kept[below[-1]].items()}
            if path or not scores:
                logits.start_from(settings, _scaled(mask if path else ones, scale))
                few = turned(items, len(below) * examples if path else 0)
                scores = removal_scores(
                    model, logits, few, examples, pad_id, problem.progress, fisher=fisher, orthogonal=orthogonal
                )
                if against is not None:
                    scores = {
                        key: torch.where(against[key].to(score.device) < 0, score, 0.0) for key, score in scores.items()
                    }
            if layer_budget is not None:  # what is gone already takes its part of the room
                gone = {key: torch.where(mask[key] > 0, score, torch.inf) for key, score in scores.items()}
                scores = within_budget(gone, layer_budget, logits.weights())
            mask = removal_mask(scores, share, mask)
            kept[share] = {key: value > 0 for key, value in mask.items()}
            found[share] = logits.masks_of(_scaled(mask, scale), plain)
        return sum(value.numel() for value in logits.values.values())

    entries = cut(shares)

    def at(share: float) -> Realigned:
        if share not in found:
            cut([share])
        return mask_family(problem, found[share], (1.0,)).at(1.0)

    return Family("removed share", tuple(sorted(shares)), at, {"entries": entries})


def _scaled(mask: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Ones as they are, zeros as `scale`."""
    return mask if scale == 0 else {key: torch.where(value > 0, value, scale) for key, value in mask.items()}
