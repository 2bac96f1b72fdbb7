"""Agreement, correction for judge errors, nested bootstrap, Holm and topics, against other libraries and by hand."""

from __future__ import annotations

import math

import krippendorff
import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from resafe.evals.statistics import (
    Bootstrap,
    Interval,
    JudgeErrors,
    by_topic,
    cohen_kappa,
    compare,
    corrected_rate,
    holm,
    krippendorff_alpha,
    nested_bootstrap,
    rogan_gladen,
    wilson,
    zero_bound,
)

RNG = np.random.default_rng


def test_kappa_is_scikit_learns() -> None:
    rng = RNG(1)
    one = rng.choice(["a", "b", "c"], 200).tolist()
    two = [x if rng.random() < 0.7 else "a" for x in one]
    found = cohen_kappa(one, two, bootstrap=Bootstrap(500))
    assert found.value == pytest.approx(cohen_kappa_score(one, two), abs=1e-12)
    assert found.low < found.value < found.high and found.n == 200
    assert not cohen_kappa(["a"] * 5, ["a"] * 5, bootstrap=Bootstrap(50)).defined


def test_kappa_of_rows_that_share_prompts_is_wider() -> None:
    """Every row four times with its prompt says no more than once: the interval by prompt is that of single rows."""
    rng = RNG(2)
    one = (rng.random(80) < 0.5).tolist()
    two = [x if rng.random() < 0.8 else not x for x in one]
    once = cohen_kappa(one, two, bootstrap=Bootstrap(1000))
    grouped = cohen_kappa(one * 4, two * 4, list(range(80)) * 4, Bootstrap(1000))
    rows = cohen_kappa(one * 4, two * 4, bootstrap=Bootstrap(1000))
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high), abs=1e-9)
    assert rows.high - rows.low < 0.6 * (grouped.high - grouped.low)


def test_alpha_is_krippendorffs() -> None:
    rng = RNG(3)
    truth = rng.integers(0, 3, 60)
    ratings = np.array([np.where(rng.random(60) < 0.75, truth, rng.integers(0, 3, 60)) for _ in range(4)], dtype=float)
    ratings[rng.random(ratings.shape) < 0.2] = np.nan
    expected = krippendorff.alpha(ratings, level_of_measurement="nominal")
    ours = [[None if math.isnan(x) else int(x) for x in row] for row in ratings]
    assert krippendorff_alpha(ours, bootstrap=Bootstrap(200)).value == pytest.approx(expected, abs=1e-12)
    assert not krippendorff_alpha([[1, None], [None, 1]]).defined


def test_holm_and_mcnemar_are_statsmodels() -> None:
    p = [0.04, 0.001, 0.5, 0.012]
    assert holm(p) == pytest.approx([0.08, 0.004, 0.5, 0.036])  # by hand: 4·.001, 3·.012, 2·.04, .5
    assert holm(p) == pytest.approx(list(multipletests(p, method="holm")[1])) and holm([]) == []
    first, second = np.repeat([1, 1, 0, 0], [9, 12, 3, 6]), np.repeat([1, 0, 1, 0], [9, 12, 3, 6])
    found = compare("x", "y", {"a": (first, second), "b": (first, first), "none": ([], [])})
    assert [c.set for c in found] == ["a", "b"]
    expected = mcnemar([[9, 12], [3, 6]], exact=True).pvalue
    assert found[0].p_value == pytest.approx(expected) and found[0].p_holm == pytest.approx(2 * expected)
    assert (found[0].only_first, found[0].only_second, found[0].difference.value) == (12, 3, pytest.approx(0.3))
    assert found[1].p_holm == 1.0


def test_rogan_gladen_by_hand() -> None:
    assert rogan_gladen(0.5, 0.9, 0.8) == pytest.approx((0.5 + 0.8 - 1) / 0.7)
    assert rogan_gladen(0.1, 0.9, 0.8) == 0.0 and rogan_gladen(0.95, 0.9, 0.95) == 1.0
    assert math.isnan(rogan_gladen(0.5, 0.5, 0.5))
    nothing = corrected_rate(wilson(5, 10), JudgeErrors(0.4, 50, 0.5, 50))
    assert nothing.reason.startswith("the judge is no better than chance")
    undefined = Interval.undefined("no items")
    assert corrected_rate(undefined, JudgeErrors(0.9, 50, 0.9, 50)) is undefined


def test_corrected_limits() -> None:
    """A judge without errors in endless rows leaves Wilson's limits; fewer labelled rows widen them."""
    rate = wilson(30, 100)
    perfect = corrected_rate(rate, JudgeErrors(1.0, 1e9, 1.0, 1e9))
    # Wilson's centre with Wald's width on n + z²: within half a point of Wilson's own limits here.
    assert (perfect.low, perfect.high) == pytest.approx((rate.low, rate.high), abs=0.005)
    many, few = (corrected_rate(rate, JudgeErrors(0.9, n, 0.95, n)) for n in (2000, 60))
    assert few.value == many.value == pytest.approx((0.3 - 0.05) / 0.85)
    assert few.high - few.low > many.high - many.low > perfect.high - perfect.low


def test_nothing_seen_does_not_prove_nothing() -> None:
    """Fewer yes than the judge's own false alarms: the limits are Wilson's for 0 of n and n of n, never a point."""
    errors = JudgeErrors(0.95, 200, 0.90, 200)
    none, every = corrected_rate(wilson(0, 168), errors), corrected_rate(wilson(168, 168), errors)
    assert (none.low, none.value, none.high) == (0.0, 0.0, pytest.approx(wilson(0, 168).high))
    assert (every.low, every.value, every.high) == (pytest.approx(wilson(168, 168).low), 1.0, 1.0)


@pytest.mark.parametrize(("true", "least"), [(0.4, 0.92), (0.02, 0.94), (0.97, 0.94)])
def test_corrected_limits_hold_the_truth(true: float, least: float) -> None:
    """Recall .85, specificity .92, 120 labelled rows of either kind: about 95 % of 400 intervals hold the true rate."""
    rng, held = RNG(7), 0
    for _ in range(400):
        recall, specificity = rng.binomial(120, 0.85) / 120, rng.binomial(120, 0.92) / 120
        seen = rng.binomial(150, true * 0.85 + (1 - true) * 0.08)
        found = corrected_rate(wilson(int(seen), 150), JudgeErrors(recall, 120, specificity, 120))
        held += found.low <= true <= found.high
    assert least <= held / 400 <= 0.995


def test_nested_over_seeds() -> None:
    rng = RNG(5)
    one_seed = (rng.random((1, 200)) < 0.4).astype(float)
    found = nested_bootstrap(one_seed, replicates=4000)
    assert (found.low, found.high) == pytest.approx((found.value - 0.068, found.value + 0.068), abs=0.012)
    same = np.repeat(one_seed, 5, axis=0)  # seeds that do not matter add nothing and take nothing away
    again = nested_bootstrap(same, replicates=4000)
    assert (again.low, again.high) == pytest.approx((found.low, found.high), abs=0.012)
    shifts = np.array([0.0, 0.5, 1.0])[:, None] * np.ones((3, 50))  # only seeds matter
    wide = nested_bootstrap(shifts, replicates=4000)
    assert (wide.value, wide.low, wide.high) == pytest.approx((0.5, 0.0, 1.0), abs=1e-12)
    two = np.stack([same, same])
    difference = nested_bootstrap(two, replicates=500)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    with pytest.raises(ValueError, match="need a statistic"):
        nested_bootstrap(np.zeros((3, 2, 2)))
    assert not nested_bootstrap(np.zeros((2, 0))).defined


def test_topics_and_nothing_of_n() -> None:
    found = by_topic([1, 0, 1, 0, 0], ["b", "b", "a", "", "b"])
    assert list(found) == ["a", "b"] and found["b"] == wilson(1, 3) and found["a"].n == 1
    assert zero_bound(150) == 0.02 and zero_bound(2) == 1.0
    exact = 1 - 0.05 ** (1 / 150)
    assert exact < zero_bound(150) < 1.02 * exact
    with pytest.raises(ValueError):
        zero_bound(0)
