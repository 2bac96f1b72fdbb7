"""Interpolation between the aligned and the tuned model: the baseline every method must beat."""

from __future__ import annotations

from resafe.realign.base import Family, Problem, Realigned, check_strengths, realign_method


@realign_method("interpolation", title="Interpolation (WiSE-FT)", source="Wortsman et al. 2022, arXiv 2109.01903")
def interpolation(problem: Problem, *, removed: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6)) -> Family:
    """θ_a + (1 − s) F(τ): a share s of the task vector is taken out evenly.

    Args:
        problem: The realignment.
        removed: Grid of s = 1 − α.

    Raises:
        InputError: A share is not from 0 to 1.
    """
    check_strengths(removed, 1.0)

    def at(share: float) -> Realigned:
        check_strengths([share], 1.0)
        return problem.masked(lambda name: 1.0 - share)

    return Family("removed share 1 − α", tuple(removed), at)
