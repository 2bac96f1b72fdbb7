"""Budgets of the layers by hand: what a layer keeps at least, in training and in a cut by scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resafe.errors import InputError
from resafe.masks import TrainSettings
from resafe.masks.budget import KEPT, budget_of, hold_budget, within_budget
from resafe.masks.summary import layer_of
from tests.masks.test_train import SHORT, trainer


def test_layers_of_keys():
    assert layer_of("model.layers.11.mlp.up_proj.weight") == ("", 11)
    assert layer_of("task1:base_model.model.model.layers.3.q_proj.lora_A.weight") == ("task1", 3)
    assert layer_of("model.layers.7") == ("", 7)
    assert layer_of("lm_head.weight") == ("", None)


def test_budgets_of_layers():
    assert [budget_of(layer, 0.9) for layer in (0, None)] == [0.9, 0.9]
    some = {"0-9": 1.0, "5": 0.5, " 12 - 14 ": 0.25}
    assert [budget_of(layer, some) for layer in (0, 5, 9, 10, 13, None)] == [1.0, 0.5, 1.0, 0.0, 0.25, 0.0]
    for wrong in (1.5, {"a": 0.5}, {"1": -0.1}):
        with pytest.raises(InputError, match="layer_budget"):
            TrainSettings(layer_budget=wrong)


@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_a_layer_below_its_budget_is_raised_to_it(spread):
    torch.manual_seed(0)
    values = {f"m.{layer}.{part}": spread * torch.randn(40, 30) - 1 for layer in (0, 1, 2) for part in "ab"}
    before = {key: value.clone() for key, value in values.items()}
    hold_budget(values, {"0": 0.8, "1": 1e-3})
    shift = values["m.0.a"] - before["m.0.a"]
    assert float(shift.min()) > 0 and float(shift.max() - shift.min()) < 1e-5 * spread  # one number for all
    torch.testing.assert_close(values["m.0.b"] - before["m.0.b"], shift[:1, :1].expand(40, 30), rtol=1e-4, atol=1e-4)
    kept = torch.sigmoid(torch.stack([values["m.0.a"], values["m.0.b"]])).mean()
    assert float(kept) == pytest.approx(0.8, abs=2e-6)
    assert all(torch.equal(values[key], before[key]) for key in before if ".0." not in key)  # above theirs, or none
    hold_budget(values, {"2": 1.0})
    assert torch.sigmoid(values["m.2.a"]).unique().tolist() == [1.0] and float(values["m.2.b"].min()) == KEPT


def test_training_stays_within_the_budget(lab):
    free = trainer(lab, replace(SHORT, learning_rate=1.0))
    free.run()
    held = trainer(lab, replace(SHORT, learning_rate=1.0, layer_budget={"1": 0.6}))
    held.run()

    def kept(made, layer):
        parts = [torch.sigmoid(v.detach()).flatten() for k, v in made.logits.values.items() if f".{layer}." in k]
        return float(torch.cat(parts).mean())

    assert kept(free, 1) < 0.6
    assert kept(held, 1) >= 0.6 - 2e-6
    assert free.identity() != held.identity()
    assert replace(free.settings, layer_budget=None) == free.settings


def test_scores_within_the_budget():
    scores = {"m.0.a": torch.tensor([5.0, 4.0, -1.0]), "m.0.b": torch.tensor([3.0]), "m.1.a": torch.tensor([1.0, -2.0])}
    found = within_budget(scores, {"0": 0.5})
    assert {key: score.tolist() for key, score in found.items()} == {
        "m.0.a": [5.0, 4.0, 0.0], "m.0.b": [0.0], "m.1.a": [1.0, -2.0]
    }  # fmt: skip
    assert within_budget(scores, 1.0)["m.1.a"].tolist() == [0.0, 0.0]
    assert within_budget(scores, 0.0)["m.0.a"].tolist() == scores["m.0.a"].tolist()


def test_budgets_count_entries_and_not_values():
    torch.manual_seed(0)
    values = {"m.0.a": torch.randn(6, 1) - 1, "m.0.b": torch.randn(4) - 1}  # six rows of 10, four values of one each
    hold_budget(values, {"0": 0.7}, weights={"m.0.a": 10.0, "m.0.b": 1.0})
    kept = 10 * torch.sigmoid(values["m.0.a"]).sum() + torch.sigmoid(values["m.0.b"]).sum()
    assert float(kept) / 64 == pytest.approx(0.7, abs=2e-6)
    scores = {"m.0.a": torch.tensor([5.0, 1.0]), "m.0.b": torch.tensor([4.0, 3.0, 2.0, 0.5])}
    found = within_budget(scores, {"0": 0.5}, {"m.0.a": 10.0, "m.0.b": 1.0})  # 12 of 24 entries may go
    assert [found[key].tolist() for key in scores] == [[5.0, 0.0], [4.0, 3.0, 0.0, 0.0]]
    alike = within_budget(scores, {"0": 0.5}, {"m.0.a": 4.0, "m.0.b": 4.0})
    assert [found.tolist() for found in alike.values()] == [[5.0, 0.0], [4.0, 3.0, 0.0, 0.0]]
