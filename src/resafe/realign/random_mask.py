"""A random mask: the control for every learned one, at the same keep rate."""

from __future__ import annotations

from torch import Tensor

from resafe.errors import InputError
from resafe.realign.base import Family, Problem, Realigned, check_strengths, realign_method
from resafe.tensors import bernoulli


@realign_method("random_mask", title="Random mask", source="control; NLSR (arXiv 2412.12497) shows its strength")
def random_mask(
    problem: Problem, *, removed: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6), rescale: bool = False
) -> Family:
    """θ_a + F(τ ⊙ b), b ~ Bernoulli(1 − s), optionally divided by 1 − s (then its expectation is the tuned model).

    Args:
        problem: The realignment.
        removed: Grid of the removed share s.
        rescale: Divide by the keep rate.

    Raises:
        InputError: A share is not from 0 to 1, or everything is removed and the rest, which is nothing, is to be
            rescaled.
    """

    def check(share: float) -> None:
        check_strengths([share], 1.0)
        if rescale and share >= 1:
            raise InputError("random_mask: a removed share of 1 leaves nothing to rescale", "give shares below 1")

    for share in removed:
        check(share)

    def at(share: float) -> Realigned:
        check(share)

        def weight(name: str) -> Tensor:
            mask = bernoulli(problem.vectors[0].shape(name), 1.0 - share, problem.seed, "random mask", name)
            return mask / (1.0 - share) if rescale else mask

        return problem.masked(weight)

    return Family("removed share", tuple(removed), at)
