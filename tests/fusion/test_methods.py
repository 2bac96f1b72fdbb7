"""Fusion methods by hand, against PEFT, and their declared traits."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils

from resafe.errors import InputError
from resafe.fusion import FUSION, Context, Fusion
from resafe.fusion.dare import drop_and_rescale
from resafe.tensors import bernoulli


def deltas(count: int = 3, shape: tuple[int, ...] = (6, 10), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_average_by_hand():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert Fusion("average").combine("w", [one, two]).tolist() == [2, 0]
    assert Fusion("average", {"weights": [3, 1]}).combine("w", [one, two]).tolist() == [1.5, 1]
    for weights in ([1.0], [1.0, -1.0]):
        with pytest.raises(InputError, match="average"):
            Fusion("average", {"weights": weights}).combine("w", [one, two])


def test_task_arithmetic_by_hand():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert Fusion("task_arithmetic").combine("w", [one]).tolist() == [1, 2]
    assert Fusion("task_arithmetic", {"weight": 0.5}).combine("w", [one, two]).tolist() == [2, 0]


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 1.0])
def test_ties_by_tensor_against_peft(keep):
    """Same tensors, same result. Where the two differ, and why the inputs here avoid it:

    - the count: PEFT truncates density · n, resafe rounds it; here density · 60 is a whole number;
    - equal magnitudes at the threshold: PEFT keeps exactly k of them, resafe all; normal draws have none;
    - entries that no model kept: PEFT may give −0.0 (a negative weight times 0), resafe gives 0.0; equal as numbers;
    - several weights: PEFT weighs after the election and divides by the count; resafe has one λ for all.
    """
    taus = deltas()
    wanted = merge_utils.ties(taus, torch.full((3,), 0.4), keep)
    found = Fusion("ties", {"keep": keep, "weight": 0.4, "scope": "tensor"}).combine("w", taus)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert (found != 0).sum() > 0


def test_ties_over_the_model_is_ties_of_the_concatenation():
    by_name = {"a": deltas(2, (4, 5), 1), "b": [10 * d for d in deltas(2, (30,), 2)]}
    fusion = Fusion("ties", {"keep": 0.3, "weight": 1.0})
    statistics = fusion.statistics(by_name, by_name.__getitem__)
    joined = [torch.cat([by_name[name][k].flatten() for name in by_name]) for k in range(2)]
    wanted = merge_utils.ties(joined, torch.ones(2), 0.3)
    found = torch.cat([fusion.combine(name, by_name[name], statistics).flatten() for name in by_name])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    per_tensor = torch.cat([fusion.combine(name, by_name[name]).flatten() for name in by_name])
    assert not torch.allclose(per_tensor, found)  # without the statistics it trims tensor by tensor


def test_ties_gradients_reach_survivors_only():
    one = torch.tensor([4.0, 3.0, 0.1, -2.0], requires_grad=True)
    two = torch.tensor([2.0, -5.0, 0.2, -3.0], requires_grad=True)
    Fusion("ties", {"keep": 0.75, "weight": 1.0, "scope": "tensor"}).combine("w", [one, two]).sum().backward()
    # the third entries are trimmed; at the second the larger mass is negative, so only `two` agrees
    assert one.grad.tolist() == [0.5, 0, 0, 0.5]
    assert two.grad.tolist() == [0.5, 1, 0, 0.5]


def test_dare_against_the_formula():
    taus = deltas(2)
    found = Fusion("dare", {"drop": 0.3, "weight": 0.5}, seed=5, models=("x", "y")).combine("w", taus)
    kept = [bernoulli((6, 10), 0.7, 5, "dare", model, "w") for model in "xy"]
    wanted = 0.5 * sum(tau * keep / 0.7 for tau, keep in zip(taus, kept, strict=True))
    torch.testing.assert_close(found, wanted)
    again = Fusion("dare", {"drop": 0.3, "weight": 0.5}, seed=5, models=("x", "y")).combine("w", taus)
    assert torch.equal(found, again)
    for other in (Fusion("dare", {"drop": 0.3}, 6, ("x", "y")), Fusion("dare", {"drop": 0.3}, 5, ("x", "z"))):
        assert not torch.allclose(found * 2, other.combine("w", taus))
    assert Context("w").model(1) == "model 1"


def test_dare_keeps_the_expectation():
    tau = torch.ones(200_000)
    dropped = drop_and_rescale(tau, 0.8, 0, "m", "w")
    assert abs(float(dropped.mean()) - 1) < 4 * 2 / 200_000**0.5  # standard deviation √(p / (1 − p)) = 2
    assert set(dropped.unique().tolist()) == {0.0, 5.0}
    for share in (1.0, -0.1):
        with pytest.raises(InputError, match="cannot drop"):
            drop_and_rescale(tau, share, 0, "m")


def test_linear_is_declared_exactly_where_it_holds():
    taus, mask = deltas(2), torch.rand(6, 10, generator=torch.Generator().manual_seed(1))
    for method in FUSION:
        if method.name in ("emr", "mask"):
            continue  # emr is where no task is asked for; mask needs a file: see test_mask_method
        fusion = Fusion(method.name, seed=1)
        before = fusion.combine("w", [mask * tau for tau in taus])
        after = mask * fusion.combine("w", taus)
        assert torch.allclose(before, after, rtol=1e-5, atol=1e-6) == fusion.linear, method.name


def test_settings_are_checked():
    assert Fusion("ties", {"keep": "0.5"}).resolved() == {"keep": 0.5, "weight": 0.4, "scope": "model", "merge": "mean"}
    with pytest.raises(InputError) as caught:
        Fusion("ties", {"kep": 0.5}).resolved()
    assert "no setting 'kep'" in caught.value.message
    assert caught.value.hint == "did you mean 'keep'?"
    for settings in ({"keep": "much"}, {"scope": "layer"}):
        with pytest.raises(InputError, match="its default is"):
            Fusion("ties", settings).resolved()
    with pytest.raises(InputError, match="did you mean 'ties'"):
        Fusion("tise").resolved()
    for keep in (-0.1, 1.5):
        with pytest.raises(InputError, match="no share"):
            Fusion("ties", {"keep": keep}).combine("w", deltas())
