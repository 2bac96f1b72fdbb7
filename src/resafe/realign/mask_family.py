"""The strengths that one mask gives: how much of what it removes is removed."""

from __future__ import annotations

from torch import Tensor

from resafe.deltas import DifferenceVector
from resafe.errors import InputError
from resafe.masks import Mask
from resafe.masks.concrete import logits_key, scaled_mask
from resafe.realign.base import Family, Problem, Realigned
from resafe.tensors import shuffled


def mask_family(problem: Problem, mask: Mask, strengths: tuple[float, ...], *, shuffle: bool = False) -> Family:
    """The family of a mask; a rescaled mask has one member, its own strength 1.

    Args:
        problem: The realignment.
        mask: The mask.
        strengths: Grid of s.
        shuffle: Shuffle the mask's entries within each tensor first: same keep rates, no information.

    Raises:
        InputError: The mask was learnt on other tensors.
    """
    granularity = mask.settings.granularity
    adapter = isinstance(vector := problem.vectors[0], DifferenceVector) and vector.tuned.kind == "adapter"
    keys = {logits_key(name, granularity) for name in problem.names}
    if unknown := sorted(set(mask.values) - keys):
        raise InputError(
            f"the task vectors have no tensor for the mask's '{unknown[0]}'", "it was learnt on other models"
        )

    def at(strength: float) -> Realigned:
        def weight(name: str) -> Tensor | float:
            if not adapter and logits_key(name, granularity) not in mask.values:
                return 0.0  # embeddings, norms, biases and the head stay aligned, as they were in training
            value = mask.weight(name)
            if shuffle:
                value = shuffled(value.expand(problem.vectors[0].shape(name)), problem.seed, "shuffle", name)
            return value if mask.settings.rescale != "none" else scaled_mask(value, strength)

        return problem.masked(weight, keep_norm=mask.settings.rescale == "norm")

    grid = (1.0,) if mask.settings.rescale != "none" else tuple(strengths)
    return Family("mask strength", grid, at, {"keep_rate": mask.keep_rate}, mask)
