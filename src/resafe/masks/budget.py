"""Budgets of the layers: how much of each layer a mask keeps at least. Knows names, logits and scores; no model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from resafe.errors import InputError
from resafe.masks.summary import layer_of

LayerBudget = float | dict[str, float]
"""A keep rate for every layer, or one for each of some: {"0-9": 1.0, "10-29": 0.9, "5": 0.95}; the last one counts."""

KEPT = 40.0
"""A logit whose mask is 1 in float32, with gradient 0: such an entry is kept whatever is learnt."""

_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
_NEAR, _TURNS = 1e-6, 60


def budget_of(layer: int | None, budget: LayerBudget) -> float:
    """The keep rate that a layer must have at least; 0 where none is set.

    Raises:
        InputError: A rate is no share, or a key is no layer and no range of layers.
    """
    found = 0.0
    for key, rate in (budget if isinstance(budget, dict) else {"": budget}).items():
        match = _RANGE.fullmatch(str(key).strip())
        if (key != "" and match is None) or not 0 <= rate <= 1:
            raise InputError(
                f"layer_budget: {key or 'all'}: {rate}", 'give a keep rate from 0 to 1, or {"0-9": 1.0, "10-29": 0.9}'
            )
        if match is None or (layer is not None and int(match[1]) <= layer <= int(match[2] or match[1])):
            found = float(rate)
    return found


def by_layer(keys: Iterable[str]) -> dict[tuple[str, int | None], list[str]]:
    """Keys of a mask by (task, layer)."""
    found: dict[tuple[str, int | None], list[str]] = {}
    for key in keys:
        found.setdefault(layer_of(key), []).append(key)
    return found


@torch.no_grad()
def hold_budget(
    values: Mapping[str, Tensor],
    budget: LayerBudget,
    total: Callable[[Tensor], Tensor] = lambda own: own,
    weights: Mapping[str, float] | None = None,
) -> None:
    """Raises the logits of every layer that keeps less than its budget, by the one number that brings it there.

    Adding a number to all logits of a layer is the smallest change (in L2) that reaches the budget to first order, and
    leaves their order as it is.

    Args:
        values: Key → logits, changed in place; of sharded logits this process's part.
        budget: The budget.
        total: Sums a tensor over all processes.
        weights: Key → entries that each of its logits stands for; None: one.
    """
    for (_, layer), keys in by_layer(values).items():
        rate = budget_of(layer, budget)
        parts = [values[key] for key in keys]
        counts = [1.0 if weights is None else weights[key] for key in keys]
        if rate >= 1:
            for part in parts:
                part.fill_(KEPT)
        elif rate > 0 and (by := _shift(parts, counts, rate, total)):
            for part in parts:
                part.add_(by)


def _shift(parts: Sequence[Tensor], counts: Sequence[float], rate: float, total: Callable[[Tensor], Tensor]) -> float:
    """The least b ≥ 0 with mean σ(φ + b) ≥ rate, over entries: Newton's method inside a bracket."""
    own = sum(part.numel() * each for part, each in zip(parts, counts, strict=True))
    count = float(total(torch.tensor(float(own), device=parts[0].device)))

    def mean_and_slope(by: float) -> tuple[float, float]:
        sums = torch.zeros(2, device=parts[0].device, dtype=torch.float64)
        for part, each in zip(parts, counts, strict=True):
            kept = torch.sigmoid(part.float() + by)
            sums += each * torch.stack([kept.sum(dtype=torch.float64), (kept * (1 - kept)).sum(dtype=torch.float64)])
        mean, slope = (total(sums) / max(1.0, count)).tolist()
        return mean, slope

    by, low, high = 0.0, 0.0, math.inf
    for turn in range(_TURNS):
        mean, slope = mean_and_slope(by)
        if abs(mean - rate) <= _NEAR or (turn == 0 and mean > rate):
            break
        low, high = (by, high) if mean < rate else (low, by)
        step = by + (rate - mean) / slope if slope > 0 else math.inf
        by = step if low < step < min(high, low + 10) else (low + high) / 2 if high < math.inf else low + 10
    return by


def within_budget(
    scores: Mapping[str, Tensor], budget: LayerBudget, weights: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """Removal scores with zeros where a layer's budget leaves no room: each layer's best `1 − rate` remain.

    Args:
        scores: Key → score; what scores zero or less is never removed.
        budget: The budget.
        weights: Key → entries that each of its scores stands for; None: one.
    """
    found = dict(scores)
    for (_, layer), keys in by_layer(scores).items():
        counts = [weights[key] if weights else 1.0 for key in keys]
        total = sum(scores[key].numel() * each for key, each in zip(keys, counts, strict=True))
        room = (1 - budget_of(layer, budget)) * total + 1e-9
        if room >= total:
            continue
        flat = torch.cat([scores[key].flatten() for key in keys])
        order = torch.sort(flat, descending=True, stable=True).indices
        if len(set(counts)) == 1:
            order = order[: math.floor(room / counts[0])]
        else:
            parts = [torch.full((scores[key].numel(),), each) for key, each in zip(keys, counts, strict=True)]
            filled = torch.cat(parts).to(flat.device)[order].cumsum(0, dtype=torch.float64)
            order = order[filled <= room]
        best = torch.zeros_like(flat)
        best[order] = flat[order]
        for key, part in zip(keys, torch.split(best, [scores[key].numel() for key in keys]), strict=True):
            found[key] = part.reshape(scores[key].shape).clamp_min(0)
    return found
