"""Model Stock: as far from the base towards the mean of the models as their angles say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resafe.fusion.base import Context, at_least, fusion_method
from resafe.fusion.gram import GramPass
from resafe.tensors import weighted_sum


@fusion_method(
    "model_stock", title="Model Stock", source="Jang et al. 2024, arXiv 2403.19522", first_pass=GramPass(),
    check=at_least(2),
)  # fmt: skip
def model_stock(deltas: Sequence[Tensor], context: Context) -> Tensor:
    """Mean of τ_k times t = N cos θ / (1 + (N − 1) cos θ), θ the mean angle between a tensor's task vectors (eq. 5).

    Args:
        deltas: Task vectors.
        context: Its statistics hold the tensor's Gram matrix.
    """
    gram, count = context.statistics["gram"], len(deltas)
    norms = gram.diagonal().clamp_min(0).sqrt()
    scale = norms[:, None] * norms[None, :]
    cosines = torch.where(scale > 0, gram / scale.clamp_min(1e-300), torch.zeros_like(gram))
    cosine = float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
    bottom = 1 + (count - 1) * cosine
    ratio = count * cosine / bottom if bottom > 0 else 0.0
    return weighted_sum(deltas, [ratio / count] * count)
