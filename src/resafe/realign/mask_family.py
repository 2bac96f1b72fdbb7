"""The strengths that masks give: how much of what they remove is removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from resafe.errors import InputError
from resafe.masks import Mask
from resafe.masks.concrete import logits_key, logits_shape, scaled_mask
from resafe.realign.base import Family, Problem, Realigned, check_strengths
from resafe.tensors import shuffled


def mask_family(
    problem: Problem, mask: Mask | Sequence[Mask], strengths: tuple[float, ...], *, shuffle: bool = False
) -> Family:
    """The family of a mask, or of one for each tuned model; a rescaled mask has one member, its own strength 1.

    Args:
        problem: The realignment.
        mask: One mask that all task vectors share, or one for each of them.
        strengths: Grid of s.
        shuffle: Shuffle a mask's entries within each tensor first: same keep rates, no information.

    Raises:
        InputError: A mask was learnt on other tensors or shapes, or there are not as many as tuned models.
    """
    masks = (mask,) if isinstance(mask, Mask) else tuple(mask)
    if len(masks) not in (1, len(problem.vectors)):
        raise InputError(
            f"{len(masks)} masks, and {len(problem.vectors)} tuned models", "give one mask, or one for each of them"
        )
    rescale = masks[0].settings.rescale
    for one in masks:
        keys = {logits_key(name, one.settings.granularity) for name in problem.names}
        if unknown := sorted(set(one.values) - keys):
            raise InputError(
                f"the task vectors have no tensor for the mask's '{unknown[0]}'", "it was learnt on other models"
            )
        _check_shapes(problem, one)
        if one.settings.rescale != rescale:
            raise InputError("the masks are rescaled in different ways", "use masks that were learnt together")

    def at(strength: float) -> Realigned:
        check_strengths([strength])
        if rescale != "none" and strength != 1.0:
            raise InputError(
                f"strength {strength:g} of a mask that is divided by its mean, or keeps norms, which has none",
                "leave the strength at 1, or train with rescale: none",
            )
        weights = [_weight(problem, one, strength, shuffle) for one in masks]
        return problem.masked(*weights, keep_norm=rescale == "norm")

    grid = (1.0,) if rescale != "none" else tuple(strengths)
    kept = sum(one.keep_rate for one in masks) / len(masks)
    facts = {"keep_rate": kept} | ({"keep_rates": [one.keep_rate for one in masks]} if len(masks) > 1 else {})
    return Family("mask strength", grid, at, facts, masks)


def _check_shapes(problem: Problem, mask: Mask) -> None:
    granularity = mask.settings.granularity
    for name in problem.names:
        key = logits_key(name, granularity)
        if key not in mask.values:
            continue
        have = tuple(mask.values[key].shape)
        wanted = logits_shape(name, tuple(problem.vectors[0].shape(name)), mask.settings)
        if have != wanted:
            raise InputError(
                f"the mask's {granularity} values for '{key}' have shape {have}, {wanted} is needed",
                "it was learnt on models of other shapes; between adapters of different ranks only a mask over weights "
                "can be used (learnt and applied with space: weights)",
            )


def _weight(problem: Problem, mask: Mask, strength: float, shuffle: bool) -> Callable[[str], Tensor | float]:
    adapter = problem.vectors[0].adapter is not None

    def moved(name: str) -> bool:
        return any(bool(vector.delta(name).any()) for vector in problem.vectors)

    def weight(name: str) -> Tensor | float:
        if logits_key(name, mask.settings.granularity) not in mask.values and not (adapter and moved(name)):
            return 0.0  # what did not learn, is no parameter of the model, or not in an older mask, stays aligned
        value = mask.weight(name)
        if shuffle:
            value = shuffled(value.expand(problem.vectors[0].shape(name)), problem.seed, "shuffle", name)
        return value if mask.settings.rescale != "none" else scaled_mask(value, strength)

    return weight
