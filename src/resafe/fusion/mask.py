"""A mask file as a fusion: task vectors, or an adapter's factors, times a mask that was learnt before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from resafe.errors import InputError
from resafe.fusion.base import Context, Inputs, fusion_method
from resafe.masks.concrete import norm_kept
from resafe.masks.format import mask_directories
from resafe.masks.stored import StoredMask
from resafe.tensors import weighted_sum


@dataclass(frozen=True)
class Masks:
    """The masks of a fusion: one that all models share, or one a model.

    A mask over weights multiplies task vectors; one over adapters' factors is applied where these are read, so that
    what reaches the method is s · (m_B ⊙ B)(m_A ⊙ A) already.

    Attributes:
        files: The masks.
        rescale: Division by the mean mask, or scaling to the task vectors' norms; None does what each file says.
        strength: s of clip(1 − s (1 − m), 0, 1).
        check: Whether the base must be the one that the mask was learnt on.
    """

    files: tuple[StoredMask, ...]
    rescale: Literal["none", "mean", "norm"] | None
    strength: float
    check: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Masks:
        """Opens the files that the settings name.

        Raises:
            InputError: A file is missing or damaged, there is none, or a strength is given for a rescaled mask.
        """
        named = [settings["file"]] if isinstance(settings["file"], str) else settings["file"]
        if not named:
            raise InputError("mask: no file is named", "give the directory of a mask as file")
        files = tuple(StoredMask.open(place) for path in named for place in mask_directories(Path(path).expanduser()))
        rescale = None if settings["rescale"] == "file" else settings["rescale"]
        if settings["strength"] != 1.0 and any((rescale or file.settings.rescale) != "none" for file in files):
            raise InputError(
                "mask: a mask that is divided by its mean, or keeps norms, has no strength",
                "set rescale=none, or leave strength at 1",
            )
        return cls(files, rescale, settings["strength"], settings["check"])

    def file(self, model: int) -> StoredMask:
        """The mask of a model."""
        return self.files[model if len(self.files) > 1 else 0]

    @property
    def digest(self) -> str:
        """See `Companion`."""
        return " ".join(file.digest for file in self.files)

    def _keeps_norm(self, model: int) -> bool:
        return (self.rescale or self.file(model).settings.rescale) == "norm"

    @property
    def whole(self) -> bool:
        """See `Companion`: what is scaled to the norm of a task vector needs all of it; factors are read whole."""
        places = range(len(self.files))
        return any(self._keeps_norm(place) and not self.files[place].of_factors for place in places)

    @property
    def base(self) -> str | None:
        """See `Companion`; what the masks' provenance says."""
        found = {str(file.provenance["aligned"]) for file in self.files if file.provenance.get("aligned")}
        return found.pop() if self.check and len(found) == 1 else None

    def problems(self, inputs: Inputs) -> list[str]:
        """See `Companion`: every tensor, shape and model that does not fit."""
        if len(self.files) not in (1, len(inputs.models)):
            return [f"{len(self.files)} masks for {len(inputs.models)} models: give one, or one a model"]
        found: list[str] = []
        for place, (name, stored) in enumerate(zip(inputs.models, inputs.adapters, strict=True)):
            mask = self.file(place)
            if not mask.of_factors:
                found += [f"{mask.directory}: {problem} (in the base)" for problem in mask.problems(inputs.shapes)]
            elif stored is None:
                found.append(
                    f"{mask.directory} lies over the factors of an adapter, and {name} is a full model: give the "
                    "adapter, or a mask over weights (learnt with space: weights)"
                )
            else:
                found += [f"{mask.directory}: {problem} (in {name})" for problem in mask.problems(stored)]
                for tensor in stored:
                    if ".lora_A." not in tensor and ".lora_B." not in tensor:
                        found.append(f"{name}: {tensor} is no factor of a plain LoRA adapter, so no mask lies over it")
                    elif not mask.covers(tensor):
                        found.append(f"{mask.directory}: no values for {tensor} (in {name})")
        return list(dict.fromkeys(found))  # a shared mask has the same problem with the base for every model

    def notes(self, inputs: Inputs) -> list[str]:
        """See `Companion`: how many tensors stay the base's."""
        if any(file.of_factors for file in self.files):
            return []
        left = [name for name in inputs.shapes if not self.touches(name)]
        return [f"{len(left)} tensors that no mask covers stay the base's, e.g. {left[0]}"] if left else []

    def touches(self, name: str) -> bool:
        """See `Companion`: what no mask covers stays the base's, as it did while the mask was learnt."""
        return any(file.of_factors or file.covers(name) for file in self.files)

    def reads(self, model: int, name: str, stored: Tensor) -> Tensor:
        """See `Companion`: a factor times its mask."""
        mask = self.file(model)
        if not mask.of_factors:
            return stored
        masked = stored * mask.whole(name, tuple(stored.shape), self.rescale, self.strength)
        return norm_kept(masked, stored) if self._keeps_norm(model) else masked

    def masked(self, model: int, delta: Tensor, context: Context) -> Tensor:
        """m_k ⊙ τ_k of a part of one tensor; zero where the mask does not cover the tensor."""
        mask, shape = self.file(model), context.shape or tuple(delta.shape)
        if not mask.covers(context.name):
            return delta if mask.of_factors else torch.zeros_like(delta)  # a product of factors was masked in these
        width = shape[-1] if shape else 1
        start = context.start // max(1, width)
        rows = delta.reshape(-1, width)
        part = mask.part(context.name, shape, (start, start + len(rows)), self.rescale, self.strength)
        masked = (rows * part.to(rows.device)).reshape(delta.shape)
        return norm_kept(masked, delta) if self._keeps_norm(model) else masked


@fusion_method(
    "mask", title="Mask file", source="Yi et al. 2024, arXiv 2405.09055", linear=True, part="row", companion=Masks.of
)
def mask(
    deltas: Sequence[Tensor],
    context: Context,
    *,
    file: str | list[str],
    rescale: Literal["file", "none", "mean", "norm"] = "file",
    strength: float = 1.0,
    weight: float = 1.0,
    check: bool = True,
) -> Tensor:
    """λ Σ w_k m_k ⊙ τ_k, with masks that `resafe realign` or a run wrote.

    Args:
        deltas: Task vectors.
        context: Coefficients w_k, and the opened masks.
        file: The directory of a mask that all models share, or one a model (or the directory that holds these).
        rescale: As the file says; "mean" divides the mask by its mean in each tensor, "norm" gives each tensor's masked
            task vector the norm that it had (and takes tensors whole), "none" does neither.
        strength: s of clip(1 − s (1 − m), 0, 1): 0 keeps the tuned model, 1 is the mask itself, more removes more.
        weight: λ.
        check: Whether the base must be the one that the mask was learnt on, where the mask says which.
    """
    masks: Masks = context.companion
    masked = [masks.masked(place, delta, context) for place, delta in enumerate(deltas)]
    return weighted_sum(masked, context.weighted(len(deltas), weight))
