"""DELLA: drop small entries with a higher probability than large ones, rescale each by its own, then combine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from resafe.errors import InputError
from resafe.fusion.base import Context, fusion_method
from resafe.fusion.ties import consensus
from resafe.tensors import uniform, weighted_sum


def keep_probabilities(delta: Tensor, drop: float, spread: float) -> Tensor:
    """1 − p_i with p_i falling linearly in the rank of |τ_i| in its row, from p + ε to p − ε (arXiv 2406.11617, §3.1).

    Args:
        delta: Task vector, (rows, width).
        drop: p, the mean drop probability.
        spread: ε.
    """
    width = delta.shape[-1]
    ranks = torch.empty_like(delta)
    order = delta.detach().abs().argsort(dim=-1, stable=True)
    ranks.scatter_(-1, order, torch.arange(width, dtype=delta.dtype, device=delta.device).expand_as(delta))
    return (1 - drop - spread) + ranks * (2 * spread / max(1, width - 1))


@fusion_method("della", title="DELLA", source="Deep et al. 2024, arXiv 2406.11617", part="row")
def della(
    deltas: Sequence[Tensor],
    context: Context,
    *,
    drop: float = 0.5,
    spread: float = 0.1,
    weight: float = 1.0,
    elect: Literal["sign", "none"] = "sign",
) -> Tensor:
    """λ · Σ of the entries kept by MAGPRUNE, each divided by its keep probability, with TIES' election or without.

    Args:
        deltas: Task vectors.
        context: Seed and names key the draws; coefficients weigh election and sum.
        drop: p, the mean drop probability.
        spread: ε; a row's largest entry is dropped with p − ε, its smallest with p + ε.
        weight: λ.
        elect: "sign" sums only entries of the elected sign, as the paper does; "none" sums all.

    Raises:
        InputError: p ± ε leaves [0, 1).
    """
    if not (drop - spread >= 0 and drop + spread < 1 and spread >= 0):
        raise InputError(
            f"della: drop {drop:g} ± {spread:g} is no range of probabilities", "keep drop ± spread within 0 and 1"
        )
    kept = []
    for index, delta in enumerate(deltas):
        keep = keep_probabilities(delta.reshape(-1, delta.shape[-1] if delta.ndim else 1), drop, spread)
        draw = uniform(
            tuple(delta.shape), context.seed, "della", context.model(index), context.name, start=context.start
        )
        keep = keep.reshape(delta.shape)
        kept.append(torch.where(draw.to(keep.device) < keep, delta / keep, torch.zeros_like(delta)))
    weights = context.weighted(len(kept))
    return weight * (consensus(kept, weights, "sum") if elect == "sign" else weighted_sum(kept, weights))
