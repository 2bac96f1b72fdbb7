"""The fusion methods beyond the first four: by hand, against whole-tensor formulas, and part by part."""

from __future__ import annotations

import math

import pytest
import torch
from peft.utils import merge_utils

from resafe.errors import InputError
from resafe.fusion import FUSION, Fusion
from resafe.fusion.della import keep_probabilities
from resafe.fusion.slerp import arc
from resafe.tensors import bernoulli


def deltas(count: int = 3, shape: tuple[int, ...] = (6, 10), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def combine(name, taus, weights=(), **settings):
    return Fusion(name, settings).combine("w", taus, weights=weights)


IN_PARTS = [m.name for m in FUSION if m.traits["part"] != "tensor" and m.name != "mask"]  # see test_mask_method


@pytest.mark.parametrize("name", IN_PARTS)
def test_every_method_is_the_same_in_parts(name):
    """Rows in any grouping give the bits of the whole, with the first pass over the whole: the engine relies on it."""
    taus = deltas(2, (8, 6), 3)
    fusion = Fusion(name, seed=5, models=("a", "b"))
    totals = fusion.gather(lambda: [[t[:3] for t in taus], [t[3:] for t in taus]])
    parts = [
        fusion.combine("w", [t[rows] for t in taus], totals, start=rows.start * 6)
        for rows in (slice(0, 1), slice(1, 5), slice(5, 8))
    ]
    assert torch.equal(torch.cat(parts), fusion.combine("w", taus, totals))
    torch.testing.assert_close(fusion.combine("w", taus), torch.cat(parts), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["task_arithmetic", "average", "ties", "dare", "dare_ties", "della", "breadcrumbs"])
def test_a_coefficient_of_zero_leaves_a_model_out_of_the_sum(name):
    taus = deltas(2)
    settings = {"scope": "tensor"} if name == "ties" else {}
    alone = combine(name, taus, (1.0, 0.0), **settings)
    other = combine(name, [taus[0], -5 * taus[1]], (1.0, 0.0), **settings)
    torch.testing.assert_close(alone, other)


def test_dare_ties_by_hand():
    taus = deltas(3)
    keep = [bernoulli((6, 10), 0.5, 0, "dare", f"model {k}", "w") for k in range(3)]
    rescaled = [2 * t * k for t, k in zip(taus, keep, strict=True)]
    total = sum(rescaled)
    sign = torch.where(total >= 0, 1.0, -1.0)
    agreeing = [r * (r * sign > 0) for r in rescaled]
    torch.testing.assert_close(combine("dare_ties", taus, drop=0.5), sum(agreeing))
    counts = sum((a != 0).float() for a in agreeing).clamp(min=1)
    torch.testing.assert_close(combine("dare_ties", taus, drop=0.5, merge="mean"), sum(agreeing) / counts)


def test_ties_with_coefficients_weighs_election_and_mean():
    one, two = torch.tensor([[1.0, -2.0]]), torch.tensor([[-3.0, 1.0]])
    found = combine("ties", [one, two], (4.0, 1.0), keep=1.0, weight=1.0)
    assert found.tolist() == [[1.0, -2.0]]  # 4 · 1 − 3 > 0; −8 + 1 < 0: only the first agrees, its mean is itself
    found = combine("ties", [one, -two], (4.0, 1.0), keep=1.0, weight=1.0, merge="sum")
    assert found.tolist() == [[7.0, -9.0]]


def test_della_probabilities_by_hand():
    row = torch.tensor([[0.1, -3.0, 2.0, 0.0, 1.0]])
    found = keep_probabilities(row, drop=0.6, spread=0.2)  # ranks 1, 4, 3, 0, 2: keep .2 to .6 in steps of .1
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.6, 0.5, 0.2, 0.4]]))


def test_della_is_unbiased_and_keeps_large_entries_more_often():
    tau = torch.randn(400, 50, generator=torch.Generator().manual_seed(1))
    fused = combine("della", [tau], drop=0.5, spread=0.3, elect="none")
    kept = (fused != 0).float()
    large = tau.abs() >= tau.abs().median()
    assert kept[large].mean() == pytest.approx(0.65, abs=0.02)  # mean of .5 to .8
    assert kept[~large].mean() == pytest.approx(0.35, abs=0.02)
    assert float((fused - tau).mean()) == pytest.approx(0, abs=0.03)  # its expectation is the task vector
    with pytest.raises(InputError, match="no range of probabilities"):
        combine("della", [tau], drop=0.9, spread=0.2)


def test_breadcrumbs_by_hand():
    tau = torch.tensor([[9.0, -8.0, 1.0, 0.5, -3.0, 4.0, 0.1, -0.2, 2.0, 7.0]])
    found = combine("breadcrumbs", [tau], top=0.2, keep=0.5, weight=0.5)
    # 9 and 8 are the top fifth; 7, 4, 3, 2, 1 the half below; .5, .2 and .1 are the smallest
    assert found.tolist() == [[0, 0, 0.5, 0, -1.5, 2.0, 0, 0, 1.0, 3.5]]
    with pytest.raises(InputError, match="no shares"):
        combine("breadcrumbs", [tau], top=1.2)


def test_breadcrumbs_ties_sums_what_agrees():
    one, two = torch.tensor([[9.0, -8.0, 1.0, 5.0]]), torch.tensor([[-3.0, -7.0, 2.0, -0.1]])
    found = combine("breadcrumbs_ties", [one, two], top=0.0, keep=0.75)
    assert found.tolist() == [[9.0, -15.0, 2.0, 5.0]]  # the smallest of each is out: 1 and −.1


def test_magnitude_pruning_agrees_with_peft():
    (tau,) = deltas(1)
    wanted = merge_utils.magnitude_prune([tau], torch.ones(1), 0.5)
    torch.testing.assert_close(combine("breadcrumbs", [tau], top=0.0, keep=0.5), wanted)


def test_dare_agrees_with_peft_in_scale():
    (tau,) = deltas(1, (200, 200))
    torch.manual_seed(0)
    theirs, ours = merge_utils.dare_linear([tau], torch.ones(1), 0.3), combine("dare", [tau], drop=0.7)
    for found in (theirs, ours):
        kept = found != 0
        torch.testing.assert_close(found[kept], tau[kept] / 0.3)
        assert kept.float().mean() == pytest.approx(0.3, abs=0.01)


def test_model_stock_by_formula():
    taus = deltas(3, (5, 7), 2)
    base = torch.randn(5, 7)
    taus = [t + 2 * base for t in taus]  # a common part, so that the angle is below 90°
    flat = [t.flatten() for t in taus]
    cosines = [torch.cosine_similarity(flat[i], flat[j], dim=0) for i in range(3) for j in range(i)]
    cosine = sum(map(float, cosines)) / 3
    ratio = 3 * cosine / (1 + 2 * cosine)
    torch.testing.assert_close(combine("model_stock", taus), ratio * sum(taus) / 3, rtol=1e-5, atol=1e-6)
    same = deltas(1)[0]
    torch.testing.assert_close(combine("model_stock", [same, same.clone()]), same)  # no angle: their mean


def test_slerp_by_formula():
    one, two = deltas(2)
    a, b = one.flatten() / one.norm(), two.flatten() / two.norm()
    angle = math.acos(float(a @ b))
    wanted = (math.sin(0.7 * angle) * one + math.sin(0.3 * angle) * two) / math.sin(angle)
    torch.testing.assert_close(combine("slerp", [one, two], t=0.3), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(combine("slerp", [one, two], t=0.0), one, rtol=1e-5, atol=1e-6)
    assert arc(1.0, 0.25) == (0.75, 0.25)  # parallel: a line
    torch.testing.assert_close(combine("slerp", [one, 2 * one], t=0.5), 1.5 * one)


def test_nuslerp_takes_its_place_from_the_coefficients():
    one, two = deltas(2)
    torch.testing.assert_close(combine("nuslerp", [one, two], (1.0, 3.0)), combine("slerp", [one, two], t=0.75))
    with pytest.raises(InputError, match="add up to 0"):
        combine("nuslerp", [one, two], (1.0, -1.0))


def test_multislerp_of_two_equal_weights_is_the_middle_of_the_arc():
    one, two = deltas(2)
    two = two * (one.norm() / two.norm())
    torch.testing.assert_close(combine("multislerp", [one, two]), combine("slerp", [one, two]), rtol=1e-4, atol=1e-5)
    same = [one, one.clone(), one.clone()]
    torch.testing.assert_close(combine("multislerp", same), one, rtol=1e-5, atol=1e-6)
    assert combine("multislerp", [one, -one]).abs().max() < 1e-5  # opposite directions have no mean


def test_multislerp_by_vectors():
    taus = deltas(3, (4, 5), 7)
    shares = torch.tensor([0.5, 0.3, 0.2])
    units = torch.stack([t.flatten() / t.norm() for t in taus])
    mean = shares @ units
    mean = mean / mean.norm()
    along = units @ mean
    angle = along.arccos()
    logs = (units - along[:, None] * mean) * (angle / angle.sin())[:, None]
    step = shares @ logs
    point = mean * step.norm().cos() + step / step.norm() * step.norm().sin()
    wanted = point * (shares @ torch.stack([t.norm() for t in taus]))
    found = combine("multislerp", taus, (5.0, 3.0, 2.0))
    torch.testing.assert_close(found.flatten(), wanted, rtol=1e-4, atol=1e-5)


def test_consensus_by_hand():
    one, two = torch.tensor([[1.0, 1.0, 0.01, -2.0]]), torch.tensor([[1.0, 0.01, 0.01, 2.1]])
    # |τ_k| > .5 |τ_all − τ_k|: (1, 1): both; (1, .01): the first only; (.01, .01): both; (−2, 2.1): both
    found = combine("consensus", [one, two], strength=0.5, needed=2, weight=1.0)
    torch.testing.assert_close(found, torch.tensor([[2.0, 0.0, 0.02, 0.1]]))
    found = combine("consensus", [one, two], strength=0.5, needed=1, weight=1.0)
    torch.testing.assert_close(found, one + two)


def test_emr_by_hand():
    one, two = torch.tensor([[1.0, -4.0, 2.0]]), torch.tensor([[3.0, 1.0, -1.0]])
    assert combine("emr", [one, two]).tolist() == [[3.0, -4.0, 2.0]]  # signs of 4, −3, 1; largest that agrees
    # for the first: it agrees everywhere; λ = (1 + 4 + 2) / (3 + 4 + 2)
    torch.testing.assert_close(combine("emr", [one, two], task=0), torch.tensor([[3.0, -4.0, 2.0]]) * 7 / 9)
    torch.testing.assert_close(combine("emr", [one, two], task=1), torch.tensor([[3.0, 0.0, 0.0]]) * 5 / 3)
    with pytest.raises(InputError, match="no model 2"):
        combine("emr", [one, two], task=2)


def test_sce_by_formula():
    taus = deltas(3)
    stacked = torch.stack(taus)
    spread = stacked.var(0, unbiased=False)
    kept = spread >= spread.flatten().topk(round(0.25 * 60)).values[-1]
    chosen = stacked * kept
    mass = (chosen**2).sum((1, 2))
    shares = (mass / mass.sum())[:, None, None]
    sign = torch.where(chosen.sum(0) >= 0, 1.0, -1.0)
    agrees = (chosen * sign > 0).float()
    wanted = (shares * chosen * agrees).sum(0) / (shares * agrees).sum(0).clamp(min=1e-30)
    torch.testing.assert_close(combine("sce", taus, keep=0.25), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="no share"):
        combine("sce", taus, keep=2.0)


def test_tsv_makes_the_tasks_orthogonal():
    taus = deltas(2, (12, 9), 4)
    found = combine("tsv", taus)
    values = torch.cat([torch.linalg.svdvals(tau)[:4] for tau in taus])
    # orthonormal directions on both sides: the singular values of the result are those of the parts
    torch.testing.assert_close(torch.linalg.svdvals(found)[:8], values.sort(descending=True).values)
    assert torch.linalg.matrix_rank(found) == 8
    alone = combine("tsv", taus[:1])
    torch.testing.assert_close(alone, taus[0], rtol=1e-4, atol=1e-5)
    vector = deltas(2, (7,))
    torch.testing.assert_close(combine("tsv", vector), sum(vector) / 2)
    with pytest.raises(InputError, match="no share"):
        combine("tsv", taus, share=0.0)
