"""Spherical interpolation: SLERP of two models, NuSLERP of two task vectors, and a mean of many on the sphere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resafe.errors import InputError
from resafe.fusion.base import Context, at_least, exactly, fusion_method
from resafe.fusion.gram import GramPass
from resafe.tensors import weighted_sum

_SOURCE = "Shoemake 1985, SIGGRAPH, §3.3"
_PARALLEL = 0.9995  # above it the arc is a line to float precision


def arc(cosine: float, t: float) -> tuple[float, float]:
    """(sin((1 − t) θ) / sin θ, sin(t θ) / sin θ) of two directions at angle θ; (1 − t, t) where they are parallel."""
    if abs(cosine) > _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _cosine(gram: Tensor) -> float:
    norms = math.sqrt(max(0.0, float(gram[0, 0])) * max(0.0, float(gram[1, 1])))
    return max(-1.0, min(1.0, float(gram[0, 1]) / norms)) if norms > 0 else 1.0


@fusion_method(
    "slerp", title="SLERP", source=_SOURCE, inputs="weights", first_pass=GramPass(), check=exactly(2)
)  # fmt: skip
def slerp(weights: Sequence[Tensor], context: Context, *, t: float = 0.5) -> Tensor:
    """The point at t of the arc from θ_1 to θ_2, tensor by tensor, lengths kept: a θ_1 + b θ_2 with `arc`'s factors.

    Args:
        weights: The two models' weights.
        context: Its statistics hold the tensor's Gram matrix; the second model's coefficient multiplies t.
        t: 0 is the first model, 1 the second.
    """
    place = t * (context.weights[1] if context.weights else 1.0)
    return weighted_sum(weights, list(arc(_cosine(context.statistics["gram"]), place)))


@fusion_method("nuslerp", title="NuSLERP", source=_SOURCE, first_pass=GramPass(), check=exactly(2))
def nuslerp(deltas: Sequence[Tensor], context: Context, *, weight: float = 1.0) -> Tensor:
    """λ · SLERP between two task vectors at t = w_2 / (w_1 + w_2): direction and length of each tensor interpolated.

    Args:
        deltas: The two task vectors.
        context: Its statistics hold the tensor's Gram matrix; coefficients w_1, w_2.
        weight: λ.

    Raises:
        InputError: The coefficients add up to zero.
    """
    first, second = context.weighted(2)
    if first + second == 0:
        raise InputError(f"nuslerp: the coefficients of {context.name} add up to 0", "give two that do not")
    factors = arc(_cosine(context.statistics["gram"]), second / (first + second))
    return weighted_sum(deltas, [weight * factor for factor in factors])


@fusion_method(
    "multislerp", title="Multi-SLERP", source="Buss, Fillmore 2001, ACM TOG 20(2), one step from the mean",
    first_pass=GramPass(), check=at_least(2),
)  # fmt: skip
def multislerp(deltas: Sequence[Tensor], context: Context, *, weight: float = 1.0, eps: float = 1e-8) -> Tensor:
    """λ · the weighted mean of the task vectors' directions on the sphere, times their weighted mean length.

    The mean is the exponential map, at the normalised linear mean μ, of the mean of the logarithms of the directions
    u_k = τ_k / ‖τ_k‖: one step of Buss and Fillmore's iteration. All of it is linear in τ_k with factors that the Gram
    matrix gives, so no tensor is held whole.

    Args:
        deltas: Task vectors.
        context: Its statistics hold the tensor's Gram matrix; coefficients are normalised to a sum of 1.
        weight: λ.
        eps: Lengths below this are taken as zero.

    Raises:
        InputError: The coefficients add up to zero.
    """
    count = len(deltas)
    given = torch.tensor(context.weighted(count), dtype=torch.float64)
    if float(given.sum()) == 0:
        raise InputError(f"multislerp: the coefficients of {context.name} add up to 0", "give some that do not")
    shares = given / given.sum()
    gram = context.statistics["gram"]
    lengths = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(lengths > eps, 1 / lengths.clamp_min(eps), torch.zeros_like(lengths))
    cosines = gram * inverse[:, None] * inverse[None, :]  # ⟨u_j, u_k⟩
    spread = float((shares @ cosines @ shares).clamp_min(0).sqrt())  # ‖Σ s_k u_k‖
    if spread < eps:
        return weighted_sum(deltas, (weight * shares).tolist())
    mean = shares / spread  # μ = Σ mean_k u_k
    along = (cosines @ mean).clamp(-1, 1)  # ⟨u_k, μ⟩
    angles = torch.arccos(along)
    sines = torch.sin(angles)
    stretch = torch.where(sines > eps, angles / sines.clamp_min(eps), torch.ones_like(angles))
    # Σ s_k log_μ(u_k) = Σ s_k stretch_k (u_k − ⟨u_k, μ⟩ μ), as factors of the u_k
    tangent = shares * stretch - float((shares * stretch * along).sum()) * mean
    size = float((tangent @ cosines @ tangent).clamp_min(0).sqrt())
    factors = math.cos(size) * mean + (math.sin(size) / size if size > eps else 1.0) * tangent
    length = float((shares * lengths).sum())
    return weighted_sum(deltas, (weight * length * factors * inverse).tolist())
