"""A removal that leaves the task's loss where it was, to first order: orthogonal to that loss's gradient.

With a mask m, what is removed is r = 1 − m; a loss with gradient a in m changes by −⟨r, a⟩. The gradient along the
way from the tuned model (m = 1) to the mask is taken as the mean of those at its two ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_TURNS = 60


def orthogonal_removal(masks: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The nearest mask (L2) whose removal does not raise the loss to first order; what is kept whole stays whole.

    Projection of r = 1 − m onto {0 ≤ r ≤ 1, ⟨r, a⟩ ≥ 0}: r' = clip(r − λ a) with the λ ≤ 0 that makes ⟨r', a⟩ = 0,
    found by halving. A mask whose removal lowers the loss already is returned as it is.

    Args:
        masks: Key → mask in [0, 1].
        gradient: Key → a, the gradient of the loss in the mask, same shapes.
    """
    removed = 1 - _flat(masks)
    a = _flat({key: gradient[key] for key in masks})
    a = torch.where(removed > 0, a, 0.0)
    if float(removed @ a) >= 0 or not float(a.abs().max()):
        return dict(masks)

    def at(size: float) -> Tensor:
        return (removed + size * a).clamp(0, 1)

    low, high = 0.0, 1 / float(a[a != 0].abs().min())  # there every entry has reached its bound: ⟨r', a⟩ ≥ 0
    for _ in range(_TURNS):
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-6
        low, high = (middle, high) if float(at(middle) @ a) < 0 else (low, middle)
    kept = (1 - at(high)).float()
    parts = torch.split(kept, [mask.numel() for mask in masks.values()])
    return {key: part.reshape(mask.shape) for (key, mask), part in zip(masks.items(), parts, strict=True)}


def orthogonal_scores(scores: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Scores less their projections onto the span of other losses' scores, over the whole model (Gram–Schmidt).

    Args:
        scores: Key → score.
        others: The same for each loss that a removal along the scores is not to change, to first order.
    """
    rest = _flat(scores)
    basis: list[Tensor] = []
    for other in others:
        direction = _flat({key: other[key] for key in scores})
        for unit in basis:
            direction = direction - unit * (direction @ unit)
        if float(norm := direction.norm()) > 0:
            basis.append(direction / norm)
    for unit in basis:
        rest = rest - unit * (rest @ unit)
    parts = torch.split(rest.float(), [score.numel() for score in scores.values()])
    return {key: part.reshape(score.shape) for (key, score), part in zip(scores.items(), parts, strict=True)}


def _flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()]).double()
