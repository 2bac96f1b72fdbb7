"""The rule that chooses a strength, worked by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from resafe.masks import Mask, MaskSettings
from resafe.recipe.realign_stages import _kept
from resafe.recipe.select import ChoiceRule, Measured, choose, judge, unmeasured
from resafe.recipe.stage import Stage

ALIGNED, TUNED = Measured(0.9, 0.1, 0.2), Measured(0.1, 0.0, 0.7)


def test_recovery_and_retention_are_shares_of_what_was_lost_and_learnt() -> None:
    found = judge(1.0, Measured(0.7, 0.04, 0.6), ALIGNED, TUNED)
    assert found.recovery == pytest.approx(0.75)  # (.7 − .1) / (.9 − .1)
    assert found.retention == pytest.approx(0.8)  # (.6 − .2) / (.7 − .2)
    assert found.excess == 0  # allowed: min(0 + .04, max(.1, 0)) = .04
    assert found.score == pytest.approx(0.75)


def test_over_refusal_beyond_what_is_allowed_has_a_price() -> None:
    measured = Measured(0.9, 0.25, 0.7)
    found = judge(1.0, measured, ALIGNED, TUNED)
    assert found.excess == pytest.approx(0.21)
    assert found.score == pytest.approx(1.0 - ChoiceRule.price * 0.21)
    bound = judge(1.0, measured, ALIGNED, TUNED, ChoiceRule(allowed=0.02, price=10))
    assert bound.excess == pytest.approx(0.23)
    assert bound.score == pytest.approx(1.0 - 2.3)
    wide = judge(1.0, measured, ALIGNED, TUNED, ChoiceRule(allowed=0.5))
    assert wide.excess == pytest.approx(0.15)  # never more than the aligned model's .1


def test_the_price_decides_between_more_safety_and_fewer_needless_refusals() -> None:
    def chosen(price: float) -> float:
        rule = ChoiceRule(price=price)
        figures = {0.4: Measured(0.5, 0.03, 0.7), 0.8: Measured(0.82, 0.08, 0.7)}  # .5 and .9; excess 0 and .04
        return choose([judge(s, m, ALIGNED, TUNED, rule) for s, m in figures.items()], rule).strength

    assert chosen(12) == 0.4  # .5 against .9 − .48
    assert chosen(8) == 0.8  # .5 against .9 − .32


def test_neither_ratio_pays_for_the_other() -> None:
    assert judge(1.0, Measured(1.0, 0.0, 0.9), ALIGNED, TUNED).score == 1.0  # both above 1: capped
    assert judge(1.0, Measured(1.0, 0.0, 0.3), ALIGNED, TUNED).score == pytest.approx(0.2)


def test_where_nothing_was_lost_only_a_loss_counts() -> None:
    aligned, tuned = Measured(0.5, 0.1, 0.3), Measured(0.55, 0.0, 0.3)  # tuned a little safer, its task no better
    figures = {0.5: (0.6, 0.3), 1.0: (0.8, 0.35), 1.5: (0.4, 0.2)}
    found = {s: judge(s, Measured(safe, 0.0, task), aligned, tuned) for s, (safe, task) in figures.items()}
    assert [candidate.recovery for candidate in found.values()] == pytest.approx([1.0, 1.0, 0.9])  # .4 is .1 below .5
    assert [candidate.retention for candidate in found.values()] == pytest.approx([1.0, 1.0, 0.9])
    assert choose(list(found.values())).strength == 0.5
    assert judge(1.0, Measured(0.1, 0.0, 0.7), TUNED, TUNED).recovery == 1.0
    assert judge(1.0, Measured(math.nan, 0.0, 0.7), aligned, tuned).recovery == 0.0


def test_of_equals_the_weakest_is_taken() -> None:
    same = Measured(0.7, 0.0, 0.6)
    candidates = [judge(s, same, ALIGNED, TUNED) for s in (1.2, 0.8, 1.0)]
    assert choose(candidates).strength == 0.8
    better = judge(2.0, Measured(0.8, 0.0, 0.7), ALIGNED, TUNED)
    assert choose([*candidates, better]).strength == 2.0


def test_a_single_strength_is_not_measured() -> None:
    only = unmeasured(0.4)
    assert choose([only]).strength == 0.4
    assert math.isnan(only.measured.utility)


def test_what_the_questions_cannot_tell_apart_goes_to_the_weaker() -> None:
    weaker, stronger = (judge(s, Measured(h, 0.0, 0.7), ALIGNED, TUNED) for s, h in ((0.9, 0.80), (1.0, 0.82)))
    assert stronger.score - weaker.score == pytest.approx(0.025)  # 1 / 84 · 2 / .8: within .04
    assert choose([stronger, weaker]).strength == 0.9
    clearly = judge(1.1, Measured(0.86, 0.0, 0.7), ALIGNED, TUNED)
    assert choose([weaker, stronger, clearly]).strength == 1.1


def test_the_kept_share_counts_entries(tmp_path) -> None:
    """Tensors of 6 and 2 entries, kept by 1 and .5 at strength 1: 7 of 8; at strength .5 by 1 and .75."""
    values = {"large": torch.ones(1, 1), "small": torch.full((1, 1), 0.5)}
    mask = Mask.of(values, MaskSettings(granularity="tensor"), entries={"large": 6, "small": 2})
    mask.save(tmp_path / "mask")
    half = round(0.5 * 255) / 255
    for strength, small in ((1.0, half), (0.5, 1 - 0.5 * (1 - half))):
        (tmp_path / "selection.json").write_text(json.dumps({"strength": strength}))
        stage = Stage("half", "x", tmp_path)
        assert _kept(stage) == pytest.approx((6 + 2 * small) / 8)
