import numpy as np
import pytest

from resafe.evals.frontier import crossing, dominated_volume, hypervolume


def test_two_measures_give_the_area() -> None:
    points = np.random.default_rng(0).random((5, 7, 2))
    assert dominated_volume(points) == pytest.approx([hypervolume(few) for few in points])


def test_three_measures_by_hand() -> None:
    # two boxes of .5 × .4 × 1 and .2 × 1 × .5; they share .2 × .4 × .5
    assert dominated_volume([(0.5, 0.4, 1.0), (0.2, 1.0, 0.5)]) == pytest.approx(0.2 + 0.1 - 0.04)


def test_three_measures_by_counting() -> None:
    points = np.random.default_rng(1).random((4, 3))
    axis = (np.arange(100) + 0.5) / 100
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)[..., None, :]
    inside = (grid < points).all(-1).any(-1)
    assert dominated_volume(points) == pytest.approx(inside.mean(), abs=0.005)


def test_negative_measures_and_dominated_points_add_nothing() -> None:
    assert dominated_volume([(0.5, 0.4), (0.4, 0.3), (-1.0, 2.0)]) == pytest.approx(0.2)


def test_points_that_were_not_measured_are_left_out() -> None:
    nan = float("nan")
    assert dominated_volume([(0.5, 0.4), (nan, 0.9), (0.4, nan)]) == pytest.approx(0.2)
    volumes = dominated_volume([[(nan, 1.0), (nan, 0.5)], [(nan, 1.0), (0.5, 0.5)]])
    assert volumes == pytest.approx([nan, 0.25], nan_ok=True)
    assert crossing([[nan, 0.95], [0.5, nan]], [[0.0, 0.19], [0.1, 0.2]], 0.9) == pytest.approx(
        [0.18, nan], nan_ok=True
    )


def test_too_many_points() -> None:
    with pytest.raises(ValueError, match="13 points"):
        dominated_volume(np.zeros((13, 2)))


def test_what_a_level_costs_by_hand() -> None:
    gains = [[0.6, 1.0, 1.2], [0.95, 0.9, 1.0], [0.2, 0.5, 0.8], [0.8, 0.7, 1.0]]
    costs = [[0.02, 0.06, 0.2], [0.19, 0.2, 0.3], [0.1, 0.1, 0.1], [0.1, 0.0, 0.09]]
    # three quarters of the way to the second; at 18/19 of the first; never; two thirds of the way from a lower one
    assert crossing(gains, costs, 0.9) == pytest.approx([0.05, 0.18, float("nan"), 0.06], nan_ok=True)
