"""The concrete (relaxed Bernoulli) mask: its shape, its draw, its exports. Pure functions of logits.

Source: Maddison, Mnih, Teh, arXiv 1611.00712 (the relaxation); SOMF, arXiv 2405.09055, §3.2 (its use on task vectors).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from resafe.errors import InputError
from resafe.tensors import keep_top, uniform

Granularity = Literal["entry", "row", "column", "rank", "head", "tensor", "layer"]
"""What shares one logit: each entry its own, a row, a column, a rank of a LoRA pair (A's row, B's column), an attention
head (its rows of the projections in, its columns of the one out; other tensors as a whole), a tensor, a layer."""

Sampling = Literal["relaxed", "straight_through", "deterministic", "direct"]
"""How the mask is formed: a relaxed Bernoulli draw a step, its rounding with the soft gradient, σ(φ), or φ itself
(for first-order scores, where the gradient with respect to the mask is wanted)."""

Rescale = Literal["none", "mean", "norm"]
"""Whether the masked task vector is left as it is, divided by the tensor's mean mask (published), or scaled to the norm
that it had without the mask."""

Export = Literal["soft", "threshold", "top_k", "sample", "last_draw"]
"""What leaves training: σ(φ); φ > 0; the highest φ up to a keep rate; one draw > ½ and the last step's relaxed draw
(the two published exports, which depend on the seed)."""

_FACTOR = re.compile(r"\.lora_(?P<side>[AB])\.")
_LAYER = re.compile(r"(.*?\.\d+)\.")  # up to the first number: experts and the like are numbered inside their layer
_HEADS_IN = re.compile(r"\.(?:(?:q|k|v|qkv)_proj|query_key_value)\.(?!lora_A)")
"""Every run of a head's width in their rows is the query, the key or the value of one head, whether these follow one
another by head (GPT-NeoX, BLOOM), by group (Falcon) or all queries first (Phi-3). GPT-2's c_attn is not among them: its
heads lie in columns."""
_HEADS_OUT = re.compile(r"\.(?:(?:o|out)_proj|(?:self_)?attention\.dense)\.(?!lora_B)")


@dataclass(frozen=True)
class MaskSettings:
    """What a mask is.

    Attributes:
        granularity: What shares one logit.
        sampling: How training forms the mask.
        temperature: T of the relaxed draw; lower is closer to Bernoulli.
        rescale: Division by the mean mask.
        initial: Initial logit φ₀; σ(φ₀) is the share of every task vector kept at the start.
        head_size: Width of an attention head, for granularity "head"; None has it read off the model.
        per_task: Every task vector has a mask of its own, in place of one that all share.
    """

    granularity: Granularity = "entry"
    sampling: Sampling = "deterministic"
    temperature: float = 0.5
    rescale: Rescale = "none"
    initial: float = 0.0
    head_size: int | None = None
    per_task: bool = False


def logits_key(name: str, granularity: Granularity) -> str:
    """The key under which a tensor's logits are kept.

    The two factors of a LoRA pair share theirs for "rank"; all tensors of a layer do for "layer", and a tensor outside
    the numbered layers has its own.
    """
    if granularity == "layer":
        numbered = _LAYER.match(name)
        return numbered[1] if numbered else name
    return _FACTOR.sub(".lora.", name) if granularity == "rank" else name


def logits_shape(name: str, shape: tuple[int, ...], settings: MaskSettings) -> tuple[int, ...]:
    """Shape of a tensor's logits; `oriented` makes them broadcastable to the tensor.

    Raises:
        InputError: "rank" is asked of a tensor that is not a LoRA factor, or heads do not fit into a tensor.
    """
    granularity = settings.granularity
    if granularity == "entry":
        return shape
    if granularity == "layer":
        return (1,)
    if granularity == "tensor":
        return (1,) * len(shape)
    if granularity == "row":
        return (shape[0],) + (1,) * (len(shape) - 1)
    if granularity == "column":
        return (1,) * (len(shape) - 1) + (shape[-1],)
    if granularity == "head":
        return _heads(name, shape, settings.head_size)
    side = _FACTOR.search(name)
    if side is None or len(shape) < 2:  # a bias of B has a factor's name
        raise InputError(
            f"granularity 'rank' needs LoRA factors, and '{name}' is none", "use entry, row, column or tensor"
        )
    return (shape[0],) if side["side"] == "A" else (shape[1],)


def _heads(name: str, shape: tuple[int, ...], size: int | None) -> tuple[int, ...]:
    """(heads, 1) for projections in, (1, heads) for the one out, ones for other tensors."""
    axis = _head_axis(name, len(shape))
    if axis is None:
        return (1,) * len(shape)
    if size is None or shape[axis] % size:
        raise InputError(f"heads of width {size} do not fit into '{name}' of shape {shape}", "use row or column")
    return tuple(length // size if place == axis else 1 for place, length in enumerate(shape))


def has_heads(name: str, shape: tuple[int, ...], size: int) -> bool:
    """Whether "head" gives a tensor more than one value, with heads of width `size`."""
    axis = _head_axis(name, len(shape))
    return axis is not None and shape[axis] > size


def _head_axis(name: str, dimensions: int) -> int | None:
    if dimensions == 1:  # a bias of the projections in
        return 0 if _HEADS_IN.search(name) else None
    return 0 if _HEADS_IN.search(name) else 1 if _HEADS_OUT.search(name) else None


def oriented(name: str, mask: Tensor, settings: MaskSettings) -> Tensor:
    """A tensor's mask from the shape of its logits into one that is broadcastable to the tensor.

    A rank mask (r,) becomes (r, 1) for a factor A and (1, r) for B; a head's value is repeated over its rows or
    columns; others pass through.
    """
    if settings.granularity == "head" and settings.head_size:
        axis = _head_axis(name, mask.dim())
        return mask if axis is None else mask.repeat_interleave(settings.head_size, axis)
    if settings.granularity != "rank":
        return mask
    side = _FACTOR.search(name)
    return mask[:, None] if side is not None and side["side"] == "A" else mask[None, :]


def collected(name: str, entries: Tensor, shape: tuple[int, ...], settings: MaskSettings) -> Tensor:
    """Sums of a tensor's entries over what shares a logit; the adjoint of `oriented` and its broadcast.

    Args:
        name: The tensor.
        entries: A value an entry.
        shape: Shape of the tensor's logits.
        settings: The mask's settings.

    Returns:
        Sums of that shape, float32.
    """
    if tuple(entries.shape) == shape:
        return entries.float()
    zeros = torch.zeros(shape, requires_grad=True)
    (found,) = torch.autograd.grad((oriented(name, zeros, settings) * entries.float()).sum(), zeros)
    return found


def relaxed_draw(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """The relaxed Bernoulli draw m = σ((φ + log u − log(1 − u)) / T).

    Args:
        logits: φ, any shape.
        noise: u in (0, 1), same shape.
        temperature: T > 0.
    """
    return (logits + torch.logit(noise)).div_(temperature).sigmoid_()  # in place: memory traffic is the cost


def noise_for(
    shape: tuple[int, ...], settings: MaskSettings, seed: int, key: str, step: int, device: Any
) -> Tensor | None:
    """Uniform numbers for one training step's draw, or None where the mask is not random.

    They are keyed by (seed, key, step), so a recomputed forward (gradient checkpointing) sees the same mask.
    """
    if settings.sampling in ("direct", "deterministic"):
        return None
    return uniform(shape, seed, "mask", key, str(step), device=device)


def mask_at(logits: Tensor, noise: Tensor | None, sampling: Sampling, temperature: float) -> Tensor:
    """The mask for given logits and noise, differentiable in the logits; float32, as they are."""
    if sampling == "direct":
        return logits
    if noise is None:
        return torch.sigmoid(logits)
    soft = relaxed_draw(logits, noise, temperature)
    if sampling == "relaxed":
        return soft
    return soft + ((soft > 0.5).to(soft.dtype) - soft).detach()


def form_mask(logits: Tensor, settings: MaskSettings, seed: int, key: str, step: int) -> Tensor:
    """The mask that one training step uses, differentiable in `logits`; bfloat16 logits make float32 masks."""
    noise = noise_for(tuple(logits.shape), settings, seed, key, step, logits.device)
    return mask_at(logits.float(), noise, settings.sampling, settings.temperature)


def rescaled(mask: Tensor, rescale: Rescale) -> Tensor:
    """The mask m / mean(m) for "mean" (gradient through the mean), else m; for "norm" see `norm_kept`.

    A mask of zeros stays one: nothing that is left could be scaled up.
    """
    return mask / _nonzero(mask.mean()) if rescale == "mean" else mask


def norm_kept(masked: Tensor, delta: Tensor) -> Tensor:
    """The masked task vector scaled to the norm of the unmasked one: m ⊙ τ · ‖τ‖ / ‖m ⊙ τ‖, gradient through both.

    Args:
        masked: m ⊙ τ.
        delta: τ, same shape.
    """
    scale: Tensor = torch.linalg.vector_norm(delta) / _nonzero(torch.linalg.vector_norm(masked))
    return masked * scale


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor > 0, divisor, 1.0)


def check_rescale(settings: MaskSettings) -> None:
    """Raises an `InputError` where one value covers a whole tensor, which rescaling would always make 1."""
    if settings.rescale != "none" and settings.granularity in ("tensor", "layer", "head"):
        raise InputError(
            f"rescale {settings.rescale!r} with granularity {settings.granularity!r}: a tensor with one value would be "
            "scaled back to what it was",
            "set rescale: none, or use entry, row, column or rank",
        )


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
        keep: Keep rate of "top_k", within these logits (for tensors with one value each, see `top_of_single`).
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


def top_of_single(logits: Mapping[str, Tensor], sizes: Mapping[str, int], keep: float) -> dict[str, Tensor]:
    """The "top_k" of keys with one value: of all of them together the highest, up to that share of their entries.

    Args:
        logits: Key → φ, one value each.
        sizes: Key → number of entries of the task vector behind it.
        keep: Share of all these entries to keep; the kept share is the nearest that whole keys give.

    Returns:
        Key → 0 or 1, float32, shape of its logits.
    """
    before, total, masks = 0, sum(sizes[key] for key in logits), dict[str, Tensor]()
    for key in sorted(logits, key=lambda key: (-float(logits[key]), key)):
        masks[key] = torch.full_like(logits[key], float(before + sizes[key] / 2 <= keep * total), dtype=torch.float32)
        before += sizes[key]
    return masks
