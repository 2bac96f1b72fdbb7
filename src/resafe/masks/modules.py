"""A language model whose task vectors pass through masks: weights θ_a + F(m ⊙ τ) formed inside the owning module.

Aligned weights and task vectors are frozen parameters (not buffers: FSDP2 shards parameters only); only the logits
train. Knows nothing of losses, data or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from resafe.deltas import DifferenceVector, TaskVector
from resafe.deltas.lora import factor_modules
from resafe.errors import InputError
from resafe.masks.concrete import MaskSettings, form_mask, logits_key, logits_shape, norm_kept, oriented, rescaled
from resafe.masks.format import Mask

Combine = Callable[[str, Sequence[Tensor]], Tensor]
"""Name and task vectors of one tensor → the fused delta, differentiable."""


_SAMPLE = 4096
"""Entries of each tensor that go into the digest of the task vectors: enough to tell two models apart."""

Reading = Literal["trained", "ones", "zeros", "random"]


class MaskLogits(nn.Module):
    """The trainable logits of a whole model, by key, with the step whose noise is to be drawn.

    Attributes:
        settings: The mask's settings.
        seed: Seed of the draws.
        step: Training step; keys the noise.
        vectors_digest: Tells the task vectors behind the masks from others (see `install_masks`).
        values: The logits by key.
        shapes: The masked tensors and their shapes.
    """

    def __init__(self, settings: MaskSettings, seed: int) -> None:
        super().__init__()
        self.settings = settings
        self.seed = seed
        self.step = 0
        self._reading: Reading = "trained"
        self.vectors_digest = ""
        self.values: dict[str, nn.Parameter] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, name: str, shape: tuple[int, ...]) -> None:
        """Creates the logits of a tensor, filled with φ₀, unless they exist (the factors of a rank share theirs)."""
        key = logits_key(name, self.settings.granularity)
        wanted = logits_shape(name, shape, self.settings)
        self.shapes[name] = shape
        if key not in self.values:
            self.values[key] = nn.Parameter(torch.full(wanted, float(self.settings.initial)))
            self.register_parameter(key.replace(".", "/"), self.values[key])

    def mask(self, name: str) -> Tensor | float:
        """The (rescaled) mask of one tensor at the present step, broadcastable to it."""
        if self._reading in ("ones", "zeros"):
            return 1.0 if self._reading == "ones" else 0.0
        key = logits_key(name, self.settings.granularity)
        logits: Tensor = self.values[key]
        purpose = key
        if self._reading == "random":
            logits, purpose = torch.zeros_like(logits), f"reference/{key}"
        drawn = form_mask(logits, self.settings, self.seed, purpose, self.step)
        return oriented(name, rescaled(drawn, self.settings.rescale), self.settings)

    def start_from(self, settings: MaskSettings, values: Mapping[str, Tensor]) -> None:
        """Takes over settings and logits, for example a warm start from scores that were read off these masks."""
        self.settings = settings
        with torch.no_grad():
            for key, parameter in self.values.items():
                parameter.copy_(values[key])
        self.zero_grad(set_to_none=True)

    def mask_of(self, values: dict[str, Tensor], settings: MaskSettings, facts: dict[str, Any] | None = None) -> Mask:
        """The mask file for these values in place of the logits.

        A layer's value is stored once a tensor, as "tensor": which tensors of a layer are masked (its linear layers,
        not its norms) no key of the layer could tell.
        """
        if settings.granularity != "layer":
            return Mask.of(values, settings, facts)
        by_tensor = {
            name: values[logits_key(name, "layer")].reshape((1,) * len(shape)) for name, shape in self.shapes.items()
        }
        return Mask.of(by_tensor, replace(settings, granularity="tensor"), facts)

    @contextmanager
    def reading(self, what: Reading) -> Iterator[None]:
        """For a while the masks are all ones (the tuned model), all zeros (the aligned one) or draws at φ = 0."""
        before, self._reading = self._reading, what
        try:
            yield
        finally:
            self._reading = before

    def removed_share(self) -> Tensor:
        """mean(1 − σ(φ)) over all logits, differentiable."""
        kept = torch.stack([torch.sigmoid(value).sum() for value in self.values.values()]).sum()
        return 1 - kept / sum(value.numel() for value in self.values.values())


class MaskedWeight(nn.Module):
    """One weight θ_a + F({m ⊙ τ_k}), formed anew at each call.

    Args:
        name: The tensor's name in the task vectors.
        aligned: θ_a, float.
        deltas: τ_k; where F is linear they come summed to one tensor, since the mask is shared.
        logits: The model's logits.
        combine: F, or None where `deltas` holds the one tensor to use.
    """

    def __init__(
        self, name: str, aligned: Tensor, deltas: Sequence[Tensor], logits: MaskLogits, combine: Combine | None
    ) -> None:
        super().__init__()
        self.name = name
        self.aligned = nn.Parameter(aligned, requires_grad=False)
        self.deltas = nn.ParameterList(nn.Parameter(delta, requires_grad=False) for delta in deltas)
        self._logits = (logits,)  # in a tuple: the logits belong to the model once, not to every weight
        self._combine = combine

    def forward(self) -> Tensor:
        """The weight, shape and dtype of `aligned`."""
        logits = self._logits[0]
        mask = logits.mask(self.name)
        keep_norm = logits.settings.rescale == "norm" and isinstance(mask, Tensor)
        if self._combine is None and not keep_norm:
            return torch.addcmul(self.aligned, self.deltas[0], _tensor(mask, self.aligned))
        masked = [delta * mask for delta in self.deltas]
        if keep_norm:
            masked = [norm_kept(part, delta) for part, delta in zip(masked, self.deltas, strict=True)]
        return self.aligned + (masked[0] if self._combine is None else self._combine(self.name, masked))


def _tensor(mask: Tensor | float, like: Tensor) -> Tensor:
    return (
        mask.to(like.dtype) if isinstance(mask, Tensor) else torch.full((), mask, dtype=like.dtype, device=like.device)
    )


class MaskedLora(nn.Module):
    """A frozen linear layer with a LoRA pair whose factors are masked: W x + s · B(A x)."""

    def __init__(self, base: nn.Linear, a: MaskedWeight, b: MaskedWeight, scaling: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scaling = base, a, b, scaling

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (…, in) to (…, out)."""
        a, b = self.a().to(x.dtype), (self.b() * self.scaling).to(x.dtype)  # masks are formed in float32
        update = functional.linear(functional.linear(x, a), b)
        return functional.linear(x, self.base.weight, self.base.bias) + update


class MaskedLinear(nn.Module):
    """A linear layer whose weight is masked; the bias stays the aligned model's."""

    def __init__(self, base: nn.Linear, weight: MaskedWeight) -> None:
        super().__init__()
        self.bias, self.weight = base.bias, weight

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (…, in) to (…, out)."""
        return functional.linear(x, self.weight().to(x.dtype), self.bias)


def install_masks(
    model: nn.Module,
    vectors: Sequence[TaskVector],
    settings: MaskSettings,
    *,
    seed: int,
    combine: Combine,
    linear: bool,
) -> MaskLogits:
    """Replaces the linear layers that the task vectors touch by masked ones, in place.

    Args:
        model: The plain base model (for adapters) or any model of the aligned architecture (full weights).
        vectors: Task vectors over the same tensors.
        settings: The mask's settings.
        seed: Seed of the draws.
        combine: The fusion F for one tensor.
        linear: Whether F is linear in the task vectors; then it is applied once, before training.

    Returns:
        The logits; train their `parameters()`.

    Raises:
        InputError: A tensor of the task vectors has no linear layer in the model, or the vectors differ in names.
    """
    names = vectors[0].names
    for vector in vectors[1:]:
        if vector.names != names:
            only = sorted(set(names) ^ set(vector.names))[:3]
            raise InputError(
                f"the tuned models cover different tensors: {', '.join(only)}", "tune them with the same targets"
            )
    linear = linear and (settings.rescale != "norm" or len(vectors) == 1)  # the norm of a sum is no sum of norms
    logits = MaskLogits(settings, seed)
    hasher = hashlib.sha256()
    device = next(model.parameters()).device

    def weight(name: str) -> MaskedWeight:
        logits.add(name, vectors[0].shape(name))
        deltas = [vector.delta(name) for vector in vectors]
        aligned = vectors[0].aligned(name)
        for tensor in (aligned, *deltas):
            hasher.update(f"{name} {tuple(tensor.shape)}".encode())
            hasher.update(tensor.flatten()[:: max(1, tensor.numel() // _SAMPLE)].contiguous().numpy().tobytes())
        fused = [combine(name, deltas)] if linear else deltas
        return MaskedWeight(name, aligned, fused, logits, None if linear else combine)

    if isinstance(vectors[0], DifferenceVector) and vectors[0].tuned.kind == "adapter":
        _install_lora(model, vectors[0], weight)
    else:
        _install_full(model, vectors[0], weight)
    logits.vectors_digest = hasher.hexdigest()
    model.requires_grad_(False)
    logits.requires_grad_(True)
    model.to(device)
    logits.to(device)
    return logits


def _install_lora(model: nn.Module, vector: DifferenceVector, weight: Callable[[str], MaskedWeight]) -> None:
    for module, (a, b, scale) in factor_modules(vector.tuned).items():
        base = _linear(model, module)
        _replace(model, module, MaskedLora(base, weight(a), weight(b), scale))


def _install_full(model: nn.Module, vector: TaskVector, weight: Callable[[str], MaskedWeight]) -> None:
    """Masks every linear layer; embeddings, norms, biases and the head stay aligned, as only layers are masked."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module, child in list(model.named_modules()):
        if isinstance(child, nn.Linear) and child is not head and f"{module}.weight" in vector.names:
            _replace(model, module, MaskedLinear(child, weight(f"{module}.weight")))


def _linear(model: nn.Module, path: str) -> nn.Linear:
    try:
        child = model.get_submodule(path)
    except AttributeError:
        child = None
    if not isinstance(child, nn.Linear):
        raise InputError(f"the model has no linear layer '{path}'", "is the adapter of another base model?")
    return child


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
