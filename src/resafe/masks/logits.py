"""The trainable logits of a whole model's masks, and what the masks are read as: trained, ones, zeros or random."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resafe.errors import InputError
from resafe.masks.concrete import MaskSettings, form_mask, logits_key, logits_shape, noise_for, oriented, rescaled
from resafe.masks.format import Mask
from resafe.masks.fused import Kernels
from resafe.masks.summary import module_of

Combine = Callable[[str, Sequence[Tensor]], Tensor]
"""Name and task vectors of one tensor → the fused delta, differentiable."""

Refit = Callable[[Callable[[str], Sequence[Tensor]]], Combine]
"""What gives a tensor's task vectors as they are now → F with its first pass taken over them."""

Reading = Literal["trained", "ones", "zeros", "random"] | int
"""A number stands for one of several tuned models alone, as it was before F, by its place."""


def sharded(tensor: Tensor) -> bool:
    """Whether it is torch's DTensor, whose module takes a third of a second to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; then every process must ask for it."""
    found: Any = tensor
    full: Tensor = found.full_tensor() if sharded(tensor) else tensor
    return full


def gathered(tensor: Tensor) -> Tensor:
    """`whole`, and on the CPU if it was sharded: all tensors together need not fit one process's device."""
    return whole(tensor).cpu() if sharded(tensor) else tensor


def held_here(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: its shard, or all of one that is not sharded."""
    found: Any = tensor
    part: Tensor = found.to_local() if sharded(tensor) else tensor
    return part


def placed_as(part: Tensor, like: Tensor) -> Tensor:
    """What every process made of its part of a tensor, as one that is sharded like it."""
    if not sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    of: Any = like
    return DTensor.from_local(part, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride())


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A full tensor sharded as another one is, on its device; as it is if that is not sharded."""
    if not sharded(like) or sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    of: Any = like
    return distribute_tensor(tensor.to(like.device), of.device_mesh, of.placements)


def assign(target: Tensor, value: Tensor) -> None:
    """Copies a tensor, full or sharded alike, into one that may be sharded."""
    with torch.no_grad():
        target.copy_(spread(value, target))


class MaskLogits(nn.Module):
    """The trainable logits of a whole model, by key, with the step whose noise is to be drawn.

    Attributes:
        settings: The mask's settings.
        seed: Seed of the draws.
        tasks: Masks that every tensor has: one that the task vectors share, or one each.
        step: Training step; keys the noise.
        vectors_digest: Tells the task vectors behind the masks from others (see `install_masks`).
        values: The logits by key.
        shapes: The masked tensors and their shapes.
        entries: Key → entries of the task vectors that its logits stand for.
        apart: Whether the tuned models can be read alone: their task vectors are held as they are.
        kernels: What forms masked weights in one pass (see `resafe.masks.fused`), where it is used.
    """

    def __init__(self, settings: MaskSettings, seed: int, tasks: int = 1) -> None:
        super().__init__()
        self.settings = settings
        self.seed = seed
        self.tasks = tasks
        self.step = 0
        self._reading: Reading = "trained"
        self.vectors_digest = ""
        self.values: dict[str, nn.Parameter] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.entries: dict[str, int] = {}
        self.apart = False
        self.kernels = Kernels()
        self._refit: Refit | None = None
        self._read: Callable[[str], Sequence[Tensor]] | None = None
        self._inside: Callable[[str | None], None] = lambda name: None
        self._combines: dict[Reading, Combine] = {}

    @property
    def alone(self) -> int | None:
        """The tuned model that is read alone, if one is."""
        return self._reading if isinstance(self._reading, int) else None

    @property
    def off(self) -> bool:
        """Whether the masks are all zeros, so that the model is the aligned one."""
        return self._reading == "zeros"

    def key(self, name: str, task: int = 0) -> str:
        """The key of a tensor's logits; with masks of their own per task, that of one task."""
        key = logits_key(name, self.settings.granularity)
        return f"task{task}:{key}" if self.tasks > 1 else key

    def add(self, name: str, shape: tuple[int, ...]) -> list[nn.Parameter]:
        """The logits of a tensor, one a mask; made and filled with φ₀ where they are not shared with another tensor."""
        wanted = logits_shape(name, shape, self.settings)
        self.shapes[name] = shape
        found = []
        for task in range(self.tasks):
            key = self.key(name, task)
            if key not in self.values:
                self._hold(key, nn.Parameter(torch.full(wanted, float(self.settings.initial))))
            if tuple(self.values[key].shape) != wanted:  # BD-LoRA's blocks
                raise InputError(
                    f"granularity '{self.settings.granularity}': '{name}' of shape {shape} does not have the ranks of "
                    "the factor that it goes with",
                    "use entry, row, column or tensor",
                )
            self.entries[key] = self.entries.get(key, 0) + math.prod(shape)
            found.append(self.values[key])
        return found

    def _hold(self, key: str, parameter: nn.Parameter) -> None:
        self.values[key] = parameter
        self.register_parameter(key.replace(".", "/"), parameter)

    def rebind(self, held: Mapping[str, nn.Parameter]) -> None:
        """Takes other parameters for the same keys: those into which sharding turned them."""
        for key, parameter in held.items():
            self._hold(key, parameter)

    def mask(self, name: str, logits: Tensor | None = None, task: int = 0) -> Tensor | float:
        """The (rescaled) mask of one tensor at the present step, broadcastable to it.

        Args:
            name: The tensor.
            logits: Its logits where the caller holds them whole; None takes those of `values`.
            task: Which of its masks.
        """
        if self._reading in ("ones", "zeros"):
            return 1.0 if self._reading == "ones" else 0.0
        logits, purpose = self._now_read(name, logits, task)
        drawn = form_mask(logits, self.settings, self.seed, purpose, self.step)
        return oriented(name, rescaled(drawn, self.settings.rescale), self.settings)

    def _now_read(self, name: str, logits: Tensor | None, task: int) -> tuple[Tensor, str]:
        """The logits of the present reading, and what keys their draw."""
        key = self.key(name, task)
        logits = self.values[key] if logits is None else logits
        return (torch.zeros_like(logits), f"reference/{key}") if self._reading == "random" else (logits, key)

    def parts(self, name: str, logits: Tensor, task: int = 0) -> tuple[Tensor, Tensor | None] | None:
        """What `kernels` form a tensor's mask from at the present step; None where they are not used.

        Args:
            name: The tensor.
            logits: Its logits.
            task: Which of its masks.

        Returns:
            Logits and uniform numbers (None for a mask without), both broadcastable to the tensor.
        """
        if self._reading in ("ones", "zeros") or not self.kernels.used_on(logits.device):
            return None
        logits, purpose = self._now_read(name, logits, task)
        noise = noise_for(tuple(logits.shape), self.settings, self.seed, purpose, self.step, logits.device)
        return oriented(name, logits, self.settings), None if noise is None else oriented(name, noise, self.settings)

    def start_from(self, settings: MaskSettings, values: Mapping[str, Tensor]) -> None:
        """Takes over settings and logits, for example a warm start from scores that were read off these masks."""
        self.settings = settings
        for key, parameter in self.values.items():
            assign(parameter, values[key])
        self.zero_grad(set_to_none=True)

    def masks_of(
        self, values: Mapping[str, Tensor], settings: MaskSettings, facts: dict[str, Any] | None = None
    ) -> tuple[Mask, ...]:
        """The mask file for these values in place of the logits; with masks of their own per task, one a task.

        A layer's value is stored once a tensor, as "tensor": which tensors of a layer are masked (its linear layers,
        not its norms) no key of the layer could tell.
        """
        return tuple(self._mask_of(values, settings, facts, task) for task in range(self.tasks))

    def _mask_of(
        self, values: Mapping[str, Tensor], settings: MaskSettings, facts: dict[str, Any] | None, task: int
    ) -> Mask:
        plain = replace(settings, per_task=False)  # one of them alone is a mask as any other
        if settings.granularity == "layer":
            by_tensor = {
                name: values[self.key(name, task)].reshape((1,) * len(shape)) for name, shape in self.shapes.items()
            }
            sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
            return Mask.of(by_tensor, replace(plain, granularity="tensor"), facts, sizes)
        prefix = f"task{task}:" if self.tasks > 1 else ""
        own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        return Mask.of(own, plain, facts, {key: self.entries[prefix + key] for key in own})

    def fit_fusion_to(self, refit: Refit | None, read: Callable[[str], Sequence[Tensor]]) -> None:
        """Says how F's first pass over the model is taken (see `refresh`), and where masked task vectors come from."""
        self._refit, self._read = refit, read

    def read_inside(self, inside: Callable[[str | None], None]) -> None:
        """Says what makes a tensor readable outside its module's forward; called with None after the last one."""
        self._inside = inside

    def refresh(self) -> None:
        """Takes F's first pass (TIES' thresholds) anew over the task vectors as they are masked now.

        Under "ones" that is done once; never under "zeros", as of nothing nothing is trimmed, and for one model alone.
        """
        unfused = self._reading == "zeros" or self.alone is not None
        if self._refit is None or unfused or (self._reading == "ones" and "ones" in self._combines):
            return
        with torch.no_grad():
            self._combines[self._reading] = self._refit(self._now)
            self._inside(None)

    def _now(self, name: str) -> Sequence[Tensor]:
        assert self._read is not None
        self._inside(name if name in self.shapes else None)
        return self._read(name)

    def combine(self, otherwise: Combine) -> Combine:
        """F for the present reading: with the totals of `refresh` where it has a first pass over the model."""
        if self._refit is None or self._reading == "zeros":
            return otherwise
        if self._reading not in self._combines:
            self.refresh()
        return self._combines[self._reading]

    @contextmanager
    def reading(self, what: Reading) -> Iterator[None]:
        """For a while the masks are all ones (the tuned model), all zeros (the aligned one) or draws at φ = 0.

        Or the model is one of the tuned ones alone, where `apart`.

        Raises:
            ValueError: One alone is asked for, and the task vectors are not held apart.
        """
        if isinstance(what, int) and not self.apart:
            raise ValueError("the task vectors are fused already; install_masks(apart=True) keeps them apart")
        before, self._reading = self._reading, what
        try:
            self.refresh()
            yield
        finally:
            self._reading = before

    def weights(self) -> dict[str, float]:
        """Key → entries of the task vectors that each of its logits stands for: 1 with a logit an entry."""
        return {key: self.entries[key] / max(1, value.numel()) for key, value in self.values.items()}

    def removed_share(self) -> Tensor:
        """mean(1 − σ(φ)) over all entries, differentiable; of sharded logits the part of this process's shards."""
        local = {key: held_here(value) for key, value in self.values.items()}
        weights = self.weights()
        kept = torch.stack([torch.sigmoid(v.float()).sum() * weights[key] for key, v in local.items()]).sum()
        held = sum(v.numel() * weights[key] for key, v in local.items())
        count = sum(self.entries.values())
        return 1 - kept / count if held == count else (held - kept) / count

    @torch.no_grad()
    def keep_rates(self) -> dict[str, float]:
        """Mean of σ(φ) over the entries of each module ("mlp.up_proj"), over all layers."""
        sums: dict[str, list[float]] = {}
        weights = self.weights()
        for key, value in self.values.items():
            entry = sums.setdefault(module_of(key), [0.0, 0])
            entry[0] += float(torch.sigmoid(whole(value.detach()).float()).sum()) * weights[key]
            entry[1] += self.entries[key]
        return {module: kept / max(1, count) for module, (kept, count) in sorted(sums.items())}
