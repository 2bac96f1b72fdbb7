"""The mask's draw, its rescaling and its product with the task vector as one compiled function, and its gradient.

Eagerly each of these steps reads and writes a tensor of the weight's size; compiled (torch.compile) they are one pass,
and the backward pass forms the mask again in place of keeping it. Nothing here knows of models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from resafe.masks.concrete import MaskSettings, Rescale, Sampling, mask_at, norm_kept, rescaled

FusedName = Literal["auto", "on", "off"]
"""Compiled on CUDA only, everywhere, or nowhere."""


def masked_weight(
    logits: Tensor, noise: Tensor | None, delta: Tensor, weight: Tensor, sampling: Sampling, temperature: float,
    rescale: Rescale,
) -> Tensor:  # fmt: skip
    """The weight θ + m ⊙ τ, shape and dtype of `weight`.

    Args:
        logits: φ, broadcastable to the weight.
        noise: Uniform numbers for a random mask, shape of `logits`; None for one without.
        delta: τ, shape and dtype of the weight.
        weight: θ.
        sampling: How the mask is formed.
        temperature: T of the relaxed draw.
        rescale: "none" or "mean".
    """
    mask = rescaled(mask_at(logits.float(), noise, sampling, temperature), rescale)
    return torch.addcmul(weight, delta, mask.to(weight.dtype))


def masked_delta(
    logits: Tensor, noise: Tensor | None, delta: Tensor, sampling: Sampling, temperature: float, rescale: Rescale
) -> Tensor:
    """The masked task vector m ⊙ τ, float32; arguments as for `masked_weight`, and "norm" scales it to τ's norm."""
    mask = rescaled(mask_at(logits.float(), noise, sampling, temperature), rescale)
    part = delta.float() * mask
    return norm_kept(part, delta.float()) if rescale == "norm" else part


class Kernels:
    """Those two functions, compiled; eager for good where compiling does not work.

    Args:
        when: Where they are used.
        backend: The backend of torch.compile.
    """

    def __init__(self, when: FusedName = "off", backend: str = "inductor") -> None:
        self.when, self.backend = when, backend
        self._able: bool | None = None

    def used_on(self, device: torch.device) -> bool:
        """Whether weights on this device are formed here, as far as is known yet."""
        return self._able is not False and (self.when == "on" or (self.when == "auto" and device.type == "cuda"))

    def weight(
        self, logits: Tensor, noise: Tensor | None, delta: Tensor, weight: Tensor, settings: MaskSettings
    ) -> Tensor:
        """`masked_weight`."""
        return self._run(self._weight, masked_weight, (logits, noise, delta, weight), settings)

    def delta(self, logits: Tensor, noise: Tensor | None, delta: Tensor, settings: MaskSettings) -> Tensor:
        """`masked_delta`."""
        return self._run(self._delta, masked_delta, (logits, noise, delta), settings)

    @cached_property
    def _weight(self) -> Callable[..., Tensor]:
        found: Callable[..., Tensor] = torch.compile(masked_weight, backend=self.backend)
        return found

    @cached_property
    def _delta(self) -> Callable[..., Tensor]:
        found: Callable[..., Tensor] = torch.compile(masked_delta, backend=self.backend)
        return found

    def _run(
        self, compiled: Callable[..., Tensor], eager: Callable[..., Tensor], tensors: tuple[Any, ...], of: MaskSettings
    ) -> Tensor:
        arguments = (*tensors, of.sampling, of.temperature, of.rescale)
        if self._able is None:
            self._able = _works(compiled, arguments)
        return (compiled if self._able else eager)(*arguments)


def _works(compiled: Callable[..., Tensor], arguments: tuple[Any, ...]) -> bool:
    """Tries both passes: a compiler may be missing, and the backward pass is compiled only when it is run."""
    from torch._dynamo.exc import TorchDynamoException

    logits = arguments[0].detach().requires_grad_()
    kept = torch.autograd.graph.saved_tensors_hooks(_same, _same)  # a checkpoint around it must not count this trial's
    try:
        with torch.enable_grad(), kept:
            torch.autograd.grad(compiled(logits, *arguments[1:]).sum(), logits)
    except (RuntimeError, TorchDynamoException) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        warnings.warn(f"masks are formed without torch.compile: {reason}", stacklevel=2)
        return False
    return True


def _same(tensor: Tensor) -> Tensor:
    return tensor
