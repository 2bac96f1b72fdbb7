"""The concrete (relaxed Bernoulli) mask: its shape, its draw, its exports. Pure functions of logits.

Source: Maddison, Mnih, Teh, arXiv 1611.00712 (the relaxation); SOMF, arXiv 2405.09055, §3.2 (its use on task vectors).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from resafe.errors import InputError
from resafe.tensors import keep_top, uniform

Granularity = Literal["entry", "row", "column", "rank", "tensor"]
"""What shares one logit: each entry its own, a row, a column, a rank of a LoRA pair (A's row, B's column), all."""

Sampling = Literal["relaxed", "straight_through", "deterministic", "direct"]
"""How the mask is formed: a relaxed Bernoulli draw a step, its rounding with the soft gradient, σ(φ), or φ itself
(for first-order scores, where the gradient with respect to the mask is wanted)."""

Rescale = Literal["none", "mean"]
"""Whether the masked task vector is divided by the tensor's mean mask (published) or left as it is."""

Export = Literal["soft", "threshold", "top_k", "sample", "last_draw"]
"""What leaves training: σ(φ); φ > 0; the highest φ up to a keep rate; one draw > ½ and the last step's relaxed draw
(the two published exports, which depend on the seed)."""

_FACTOR = re.compile(r"\.lora_(?P<side>[AB])\.")


@dataclass(frozen=True)
class MaskSettings:
    """What a mask is.

    Attributes:
        granularity: What shares one logit.
        sampling: How training forms the mask.
        temperature: T of the relaxed draw; lower is closer to Bernoulli.
        rescale: Division by the mean mask.
        initial: Initial logit φ₀; σ(φ₀) is the share of every task vector kept at the start.
    """

    granularity: Granularity = "entry"
    sampling: Sampling = "deterministic"
    temperature: float = 0.5
    rescale: Rescale = "none"
    initial: float = 0.0


def logits_key(name: str, granularity: Granularity) -> str:
    """The key under which a tensor's logits are kept; the two factors of a LoRA pair share theirs for "rank"."""
    return _FACTOR.sub(".lora.", name) if granularity == "rank" else name


def logits_shape(name: str, shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of a tensor's mask, broadcastable to the tensor; for "rank" see `oriented`.

    Raises:
        InputError: "rank" is asked of a tensor that is not a LoRA factor.
    """
    if granularity == "entry":
        return shape
    if granularity == "tensor":
        return (1,) * len(shape)
    if granularity == "row":
        return (shape[0],) + (1,) * (len(shape) - 1)
    if granularity == "column":
        return (1,) * (len(shape) - 1) + (shape[-1],)
    side = _FACTOR.search(name)
    if side is None:
        raise InputError(
            f"granularity 'rank' needs LoRA factors, and '{name}' is none", "use entry, row, column or tensor"
        )
    return (shape[0],) if side["side"] == "A" else (shape[1],)


def oriented(name: str, mask: Tensor, granularity: Granularity) -> Tensor:
    """Turns a rank mask (r,) into (r, 1) for a factor A and (1, r) for B; other masks pass through."""
    if granularity != "rank":
        return mask
    side = _FACTOR.search(name)
    return mask[:, None] if side is not None and side["side"] == "A" else mask[None, :]


def relaxed_draw(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """The relaxed Bernoulli draw m = σ((φ + log u − log(1 − u)) / T).

    Args:
        logits: φ, any shape.
        noise: u in (0, 1), same shape.
        temperature: T > 0.
    """
    return (logits + torch.logit(noise)).div_(temperature).sigmoid_()  # in place: memory traffic is the cost


def form_mask(logits: Tensor, settings: MaskSettings, seed: int, key: str, step: int) -> Tensor:
    """The mask that one training step uses, differentiable in `logits`.

    The noise is keyed by (seed, key, step), so a recomputed forward (gradient checkpointing) sees the same mask.
    """
    if settings.sampling == "direct":
        return logits
    if settings.sampling == "deterministic":
        return torch.sigmoid(logits)
    noise = uniform(tuple(logits.shape), seed, "mask", key, str(step), device=logits.device)
    soft = relaxed_draw(logits, noise, settings.temperature)
    if settings.sampling == "relaxed":
        return soft
    return soft + ((soft > 0.5).to(soft.dtype) - soft).detach()


def rescaled(mask: Tensor, rescale: Rescale) -> Tensor:
    """The mask m / mean(m) for "mean" (gradient through the mean), m for "none"."""
    return mask / mask.mean() if rescale == "mean" else mask


def scaled_mask(mask: Tensor, strength: float) -> Tensor:
    """m_s = clip(1 − s (1 − m), 0, 1): s = 0 is the tuned model, s = 1 the mask itself, beyond 1 it removes more."""
    return (1 - strength * (1 - mask)).clamp(0, 1)


def export_mask(
    logits: Tensor,
    settings: MaskSettings,
    export: Export,
    *,
    keep: float = 0.5,
    seed: int = 0,
    key: str = "",
    step: int = 0,
) -> Tensor:
    """The mask that is applied after training, before rescaling; float32 in [0, 1], shape of `logits`.

    Args:
        logits: φ.
        settings: The mask's settings (temperature of the published draw).
        export: How to turn logits into a mask.
        keep: Keep rate of "top_k".
        seed: Seed of "sample".
        key: Name that keys the draws.
        step: Last training step, for "last_draw".
    """
    logits = logits.detach().to(torch.float32)
    if export == "soft":
        return torch.sigmoid(logits)
    if export == "threshold":
        return (logits > 0).to(torch.float32)
    if export == "top_k":
        return keep_top(logits, keep)
    if export == "last_draw":
        return form_mask(logits, replace(settings, sampling="relaxed"), seed, key, step)
    noise = uniform(tuple(logits.shape), seed, "export", key, device=logits.device)
    return (relaxed_draw(logits, noise, settings.temperature) > 0.5).to(torch.float32)
