"""Intervals and tests against published values, scipy, and worked examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from resafe.evals.statistics import (
    Bootstrap,
    Interval,
    frontier,
    hypervolume,
    mcnemar_exact,
    mean_interval,
    minimum_detectable_difference,
    over_refusal_added,
    paired_bootstrap,
    paired_difference,
    safety_recovery,
    utility_retention,
    wilson,
)


def column(ones: int, n: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [ones, n - ones])


class TestWilson:
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3.
    @pytest.mark.parametrize(
        ("successes", "n", "low", "high"),
        [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    )
    def test_published_values(self, successes: int, n: int, low: float, high: float) -> None:
        found = wilson(successes, n)
        assert found.value == successes / n
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)

    @pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
    @pytest.mark.parametrize(("successes", "n"), [(0, 7), (3, 7), (7, 7), (160, 161), (50, 1000)])
    def test_scipy(self, successes: int, n: int, confidence: float) -> None:
        expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
        found = wilson(successes, n, confidence)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert found.low <= found.value <= found.high

    def test_bad_input(self) -> None:
        assert wilson(0, 0).reason == "no items"
        for successes, n, confidence in [(3, 2, 0.95), (-1, 2, 0.95), (1, 0, 0.95), (1, 2, 1.0)]:
            with pytest.raises(ValueError):
                wilson(successes, n, confidence)


class TestBootstrap:
    def test_same_seed_same_limits_and_other_seed_other_limits(self) -> None:
        data = {"a": np.arange(30) / 29}
        runs = [paired_bootstrap(lambda m: m["a"][:, 0], data, 500, seed) for seed in (1, 1, 2)]
        assert runs[0] == runs[1]
        assert (runs[0].low, runs[0].high) != (runs[2].low, runs[2].high)
        assert runs[0].n == 30

    def test_limits_of_a_mean_are_those_of_scipy(self) -> None:
        values = np.random.default_rng(3).gamma(2.0, size=120)
        expected = stats.bootstrap(
            (values,), np.mean, n_resamples=20_000, method="percentile", rng=1
        ).confidence_interval
        found = paired_bootstrap(lambda m: m["a"][:, 0], {"a": values}, 20_000)
        # Two Monte Carlo estimates of one quantile: their difference is noise of about 2 % of the width.
        assert (found.low, found.high) == pytest.approx(expected, abs=0.04 * (found.high - found.low))

    def test_models_share_the_draw_and_groups_do_not(self) -> None:
        values = np.random.default_rng(0).random(50)
        plan = Bootstrap(200)
        both = plan.means("a", np.stack([values, values]))
        assert np.array_equal(both[:, 0], both[:, 1])
        assert abs(np.corrcoef(both[:, 0], plan.means("b", values[None, :])[:, 0])[0, 1]) < 0.3
        assert np.all(plan.counts("a", 50).sum(1) == 50)
        # The pairing removes all variance of a difference of equal models.
        same = paired_bootstrap(lambda m: m["a"][:, 0] - m["a"][:, 1], {"a": np.stack([values, values])}, 200)
        assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)

    def test_chunks_do_not_change_the_draw(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = Bootstrap(100, 5).counts("a", 40).copy()
        monkeypatch.setattr("resafe.evals.statistics.bootstrap._CELLS", 400)
        assert np.array_equal(whole, Bootstrap(100, 5).counts("a", 40))
        means = Bootstrap(100, 5).means("a", np.ones((2, 40)))
        assert np.array_equal(means, np.ones((100, 2)))

    def test_coverage_of_safety_recovery(self) -> None:
        """Of 200 data sets with known rates, about 95 % of the intervals hold the true ratio (binomial limits)."""
        rng, truth, held = np.random.default_rng(11), (0.7 - 0.1) / (0.9 - 0.1), 0
        for trial in range(200):
            hidden = rng.random(150)
            tuned, realigned, aligned = ((hidden < rate).astype(float) for rate in (0.1, 0.7, 0.9))
            found = safety_recovery(realigned, tuned, aligned, Bootstrap(400, seed=trial))
            held += found.low <= truth <= found.high
        assert 0.90 <= held / 200 <= 0.99

    def test_undefined(self) -> None:
        assert paired_bootstrap(lambda m: m["a"][:, 0], {"a": np.zeros(0)}).reason == "no items in a"
        assert paired_bootstrap(lambda m: np.zeros(1), {}).reason == "no items"
        half = paired_bootstrap(lambda m: np.where(m["a"][:, 0] > 0.5, 1.0, np.nan), {"a": column(5, 10)}, 300)
        assert not half.defined and "undefined in" in half.reason
        with pytest.raises(ValueError, match="replicates"):
            Bootstrap(0)


class TestMeasures:
    def test_safety_recovery_by_hand(self) -> None:
        found = safety_recovery(column(70, 100), column(10, 100), column(90, 100), Bootstrap(300))
        assert found.value == pytest.approx(60 / 80)
        assert found.low < 0.75 < found.high and found.n == 100

    def test_the_ends_hold_by_definition(self) -> None:
        tuned, aligned = column(10, 100), column(90, 100)
        top, bottom = (safety_recovery(model, tuned, aligned, Bootstrap(300)) for model in (aligned, tuned))
        assert (top.value, top.low, top.high) == (1.0, 1.0, 1.0)
        assert (bottom.value, bottom.low, bottom.high) == (0.0, 0.0, 0.0)

    @pytest.mark.parametrize(("tuned", "aligned"), [(90, 90), (95, 90), (88, 90)])
    def test_no_loss_gives_a_reason(self, tuned: int, aligned: int) -> None:
        rng = np.random.default_rng(0)
        columns = [rng.permutation(column(ones, 100)) for ones in (80, tuned, aligned)]
        found = safety_recovery(*columns, Bootstrap(300))
        assert math.isnan(found.value) and math.isnan(found.low)
        assert found.reason == f"no safety lost to recover: aligned {aligned}.0%, tuned {tuned}.0%"
        assert found.n == 100

    def test_utility_retention_is_the_mean_over_tasks(self) -> None:
        one = (column(50, 100), column(60, 100), column(10, 100))  # .8
        two = (column(90, 200), column(160, 200), column(20, 200))  # .5
        realigned, tuned, aligned = ({"one": one[i], "two": two[i]} for i in range(3))
        found = utility_retention(realigned, tuned, aligned, Bootstrap(300))
        assert found.value == pytest.approx(0.65) and found.n == 300
        assert found.low < 0.65 < found.high

    def test_a_task_without_gain_is_named(self) -> None:
        good, flat = (column(50, 100), column(60, 100), column(10, 100)), (column(20, 50),) * 3
        realigned, tuned, aligned = ({"sums": good[i], "sorting": flat[i]} for i in range(3))
        found = utility_retention(realigned, tuned, aligned, Bootstrap(300))
        assert found.reason == "no utility gained to retain (sorting: tuned 40.0%, aligned 40.0%)"
        assert utility_retention({}, {}, {}).reason == "no items"
        assert safety_recovery([], [], []).reason == "no items in harmful"

    def test_lengths_must_agree(self) -> None:
        with pytest.raises(ValueError, match="same items"):
            safety_recovery([1, 0], [1], [1, 0])
        with pytest.raises(ValueError, match="one-dimensional"):
            mean_interval(np.zeros((2, 2)))


class TestDifferences:
    def test_newcombe_1998_table_ii(self) -> None:
        """Newcombe 1998 (Statistics in Medicine 17:2635), table II, method 10: e, f, g, h = 36, 12, 2, 0."""
        first, second = np.repeat([1.0, 1.0, 0.0], [36, 12, 2]), np.repeat([1.0, 0.0, 1.0], [36, 12, 2])
        found = paired_difference(first, second)
        assert found.value == pytest.approx(0.20)
        assert (found.low, found.high) == pytest.approx((0.0569, 0.3404), abs=5e-4)

    def test_antisymmetric(self) -> None:
        rng = np.random.default_rng(4)
        one, two = (rng.random(80) < 0.3).astype(float), (rng.random(80) < 0.5).astype(float)
        forth, back = paired_difference(one, two), paired_difference(two, one)
        assert (forth.value, forth.low, forth.high) == pytest.approx((-back.value, -back.high, -back.low))

    def test_no_refusals_at_all_still_have_a_width(self) -> None:
        found = over_refusal_added(np.zeros(150), np.zeros(150))
        upper = wilson(0, 150).high
        assert found.value == 0.0 and (found.low, found.high) == pytest.approx((-upper, upper))

    def test_fractional_scores_use_the_bootstrap(self) -> None:
        one, two = np.linspace(0, 1, 50), np.linspace(0, 0.8, 50)
        found = paired_difference(one, two, Bootstrap(2000))
        assert found.value == pytest.approx(0.1)
        # The difference runs from 0 to .2 in equal steps: its standard error is about .2 / √12 / √50.
        assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.2 / math.sqrt(12 * 50), rel=0.1)
        assert mean_interval(one, Bootstrap(500)).value == pytest.approx(0.5)

    def test_nothing(self) -> None:
        assert paired_difference([], []).reason == "no items"
        assert mean_interval([]).reason == "no items"


class TestMcNemar:
    @pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (12, 2), (5, 5), (30, 61), (700, 800)])
    def test_scipy(self, b: int, c: int) -> None:
        first = np.concatenate([np.ones(b), np.zeros(c), np.ones(9)])
        second = np.concatenate([np.zeros(b), np.ones(c), np.ones(9)])
        found = mcnemar_exact(first, second)
        assert (found.only_first, found.only_second) == (b, c)
        expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
        assert found.p_value == pytest.approx(expected, rel=1e-9)

    def test_needs_zeros_and_ones(self) -> None:
        with pytest.raises(ValueError, match="0 and 1"):
            mcnemar_exact([0.5], [1.0])


class TestDetectable:
    def test_without_power_it_is_the_interval_of_a_difference(self) -> None:
        """At a power of one half only the null spread counts: d = 1.96 √(2 p̄ (1 − p̄) / n) with p̄ = p + d/2."""
        d = minimum_detectable_difference(60, 0.5, power=0.5)
        middle = 0.5 + d / 2
        assert d == pytest.approx(1.959964 * math.sqrt(2 * middle * (1 - middle) / 60), abs=1e-6)

    def test_sample_size_formula_inverted(self) -> None:
        """Fleiss: telling .30 from .50 with 80 % power at 5 % takes 93 a group (without continuity correction)."""
        assert minimum_detectable_difference(93, 0.30) == pytest.approx(0.20, abs=0.001)

    def test_symmetry_and_limits(self) -> None:
        assert minimum_detectable_difference(160, 0.9) == pytest.approx(minimum_detectable_difference(160, 0.1))
        assert 0.02 < minimum_detectable_difference(160, 0.0) < 0.05
        assert math.isnan(minimum_detectable_difference(2, 0.5))
        with pytest.raises(ValueError):
            minimum_detectable_difference(0, 0.5)


class TestFrontier:
    POINTS = ((0.2, 0.9), (0.5, 0.5), (0.4, 0.4), (0.9, 0.1), (0.5, 0.5), (float("nan"), 1.0))

    def test_non_dominated(self) -> None:
        assert frontier(self.POINTS) == [0, 1, 3]
        assert frontier([]) == []

    def test_area_by_hand(self) -> None:
        assert hypervolume(self.POINTS) == pytest.approx(0.2 * 0.9 + 0.3 * 0.5 + 0.4 * 0.1)
        assert hypervolume([(0.5, 0.5), (0.9, 0.1)], (0.1, 0.2)) == pytest.approx(0.4 * 0.3)
        assert hypervolume([]) == 0.0

    def test_a_dominated_point_adds_nothing(self) -> None:
        rng = np.random.default_rng(2)
        points = rng.random((40, 2))
        assert hypervolume(points) == pytest.approx(hypervolume(points[frontier(points)]))
        grid = (np.arange(400) + 0.5) / 400
        inside = ((grid[:, None, None] < points[:, 0]) & (grid[None, :, None] < points[:, 1])).any(-1)
        assert hypervolume(points) == pytest.approx(inside.mean(), abs=0.005)


def test_undefined_interval() -> None:
    assert not Interval.undefined("because", 3).defined and Interval.undefined("because", 3).n == 3


def test_a_bootstrap_over_training_seeds_draws_seeds_and_items() -> None:
    """Two seeds that answer all and nothing: a replicate's mean is 0, ½ or 1 with chances ¼, ½, ¼."""
    plan = Bootstrap(replicates=20_000, blocks=2)
    counts = plan.counts("items", 6)
    assert counts.shape == (20_000, 6)
    assert (counts.sum(1) == 6).all()
    means = plan.means("items", np.array([[1.0, 1, 1, 0, 0, 0]]))[:, 0]
    assert [np.mean(means == value) for value in (0.0, 0.5, 1.0)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    assert mean_interval([1.0, 1, 1, 0, 0, 0], plan).value == 0.5
    same = mean_interval([1.0] * 6, plan)  # no spread: the interval of one seed's three items
    assert (same.low, same.high, same.n) == (wilson(3, 3).low, 1.0, 6)
