"""Every preference loss and its reported rewards against TRL's own DPOTrainer, on the same log-probabilities."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from resafe.masks.losses import SMOOTHED, LossName
from tests.masks.two_processes import SHORT, trainer


def trl_loss(name: str, table: torch.Tensor, fixed: torch.Tensor, lengths: torch.Tensor, beta: float, smoothing: float):
    """TRL's loss and metrics, its model replaced by one whose first answer token carries the whole log-probability."""
    dpo: Any = pytest.importorskip("trl").DPOTrainer
    sums, count = table.T.flatten(), lengths.T.flatten()  # TRL's order: all chosen, then all rejected
    width = 1 + int(count.max())
    completion = (torch.arange(width)[None] >= 1) & (torch.arange(width)[None] <= count[:, None])
    per_token = torch.zeros(len(sums), width - 1)
    per_token[:, 0] = sums
    nothing = torch.zeros(len(sums), width - 1)
    outputs = SimpleNamespace(
        log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), log_sum_sq_probs=nothing
    )
    gather = {"gather": lambda value: value, "gather_for_metrics": lambda value: value}
    itself = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=SimpleNamespace(device=torch.device("cpu"), **gather),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=[name], loss_weights=[1.0], beta=beta, label_smoothing=smoothing, use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05), _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
        _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.ones(len(sums), width, dtype=torch.long), "attention_mask": torch.ones(len(sums), width),
        "completion_mask": completion.long(), "ref_chosen_logps": fixed[:, 0], "ref_rejected_logps": fixed[:, 1],
    }  # fmt: skip
    loss = dpo._compute_loss(itself, lambda **_: outputs, inputs, False)
    return float(loss), {key: values[-1] for key, values in itself._metrics["eval"].items() if "rewards" in key}


@pytest.mark.parametrize("name", [name for name in get_args(LossName) if name not in ("sft", "distill")])
def test_loss_and_rewards_are_trls(lab, name):
    smoothing = 0.2 if name in SMOOTHED else 0.0
    made = trainer(lab, "default")
    made.settings = replace(SHORT, loss=name, beta=0.3, label_smoothing=smoothing)
    pairs = [item for item in made.items if item.rejected]
    loss, metrics = made.loss(pairs)
    with torch.no_grad():
        table = made._pairs(pairs)
    lengths = torch.tensor([[len(item.chosen.answer), len(item.rejected.answer)] for item in pairs])
    wanted, rewards = trl_loss(name, table, made.reference()[[item.index for item in pairs]], lengths, 0.3, smoothing)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert set(rewards) == {key for key in metrics if key.startswith("rewards")}
    for key, value in rewards.items():
        assert metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert abs(metrics["rewards/margins"]) > 1e-3
