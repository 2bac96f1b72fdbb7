"""The training loop: learning, resuming, caching, and the published algorithm written a second time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from resafe.deltas import task_vector
from resafe.errors import ResafeError
from resafe.masks import PRESETS, MaskTrainer, TrainSettings, encode_items
from resafe.masks.engine import EngineSettings
from resafe.masks.train import learning_rate_at
from resafe.realign import Problem
from resafe.realign.learn import train_mask
from resafe.realign.warm import WarmStart
from resafe.tensors import uniform
from tests.evals.tiny import tiny_tokenizer
from tests.masks.test_modules import masked
from tests.tiny import KEEP, PAIRS, Source, logits

ITEMS = encode_items(tiny_tokenizer(), None, PAIRS, KEEP)
SHORT = TrainSettings(steps=6, batch_size=4, warmup_steps=2)


def trainer(lab, settings=SHORT, tuned="tuned", mask=None, items=ITEMS, **more):
    model, values, _ = masked(lab, (tuned,), **(mask or {}))
    return MaskTrainer(model, values, items, settings, pad_id=1, **more)


def test_schedule_by_hand():
    settings = TrainSettings(steps=10, warmup_steps=2, learning_rate=0.4)
    rates = [learning_rate_at(settings, step) for step in range(10)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.4])
    assert rates[6] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(0.2 * (1 + math.cos(math.pi * 7 / 8)))


@pytest.mark.parametrize("loss", ["sft", "sigmoid", "ipo", "hinge"])
def test_the_loss_falls(lab, loss):
    made = trainer(lab, replace(SHORT, loss=loss, steps=12, batch_size=13, beta=0.5))
    with torch.no_grad():
        before = float(made.loss(made.items)[0])
    metrics = made.run()
    with torch.no_grad():
        after = float(made.loss(made.items)[0])
    assert after < before - 0.01
    assert set(metrics) >= ({"nll/task"} if loss == "sft" else {"rewards/margins", "rewards/accuracies"})


def test_objective_by_hand(lab):
    """DPO at m = 1 has no margin: log 2, plus the task's own part, plus the price of what is removed."""
    made = trainer(lab, replace(SHORT, loss="sigmoid", removal_price=2.0), mask={"sampling": "direct", "initial": 1.0})
    batch = [ITEMS[0], ITEMS[6], ITEMS[10]]
    loss, metrics = made.loss(batch)
    price = 2 * (1 - torch.sigmoid(torch.tensor(1.0)))
    assert float(loss) == pytest.approx(math.log(2) + metrics["nll/task"] / 2 + float(price), rel=1e-5)
    aligned = trainer(lab, replace(SHORT, loss="sigmoid", reference="aligned"))
    assert not torch.allclose(aligned.reference(), made.reference(), atol=1e-3)


def test_a_loss_that_is_no_number_stops_the_training(lab):
    made = trainer(lab)
    with torch.no_grad():
        next(iter(made.logits.values.values())).fill_(math.nan)
    with pytest.raises(ResafeError, match="the loss is nan at step 3"):
        made.step(2)


def test_gradients_are_clipped(lab):
    made = trainer(lab, replace(SHORT, max_norm=1e-6))
    made.step(0)
    norm = torch.stack([p.grad.norm() for p in made.logits.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-6, rel=1e-2)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("settings", [SHORT, PRESETS["paper"].training], ids=["sft", "paper"])
def test_a_killed_run_ends_with_the_same_logits(lab, tmp_path, settings):
    settings = replace(settings, steps=6, batch_size=4)
    mask = {"sampling": "relaxed", "rescale": "mean"} if settings.reference == "random" else {}
    straight = trainer(lab, settings, mask=mask)
    straight.run()

    def kill(step, total, metrics):
        if step == 4:
            raise KilledError

    killed = trainer(lab, settings, mask=mask, work=tmp_path, checkpoint_every=3, progress=kill)
    with pytest.raises(KilledError):
        killed.run()
    seen = []
    resumed = trainer(
        lab, settings, mask=mask, work=tmp_path, checkpoint_every=3, progress=lambda step, *_: seen.append(step)
    )
    resumed.run()
    assert seen == [4, 5, 6]
    for key, value in straight.logits.values.items():
        torch.testing.assert_close(resumed.logits.values[key], value, rtol=0, atol=1e-7)
    torch.testing.assert_close(logits(resumed.model), logits(straight.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["default", "labels"])
def test_a_killed_run_of_a_preset_ends_with_the_same_mask(lab, tmp_path, monkeypatch, name):
    """As `somf` runs it, from the warm start's scores to the export, bit for bit."""
    preset = PRESETS[name]
    training = replace(preset.training, steps=13)
    # The preset's share of these few entries would be hardly any, and the other preset starts at one logit.
    warm = WarmStart(0.2, kept=preset.warm_kept) if preset.warm_share > 0 else None
    assert (name == "default") == (training.loss == "distill") == (training.removal_price == 1) == (warm is not None)

    trainers = []

    class Kept(MaskTrainer):
        def run(self):
            trainers.append(self)
            return super().run()

    monkeypatch.setattr("resafe.realign.learn.MaskTrainer", Kept)

    def train(work, progress=None):
        problem = Problem(
            [task_vector(lab.open("tuned"), lab.open("safe"))], pairs=PAIRS, keep=KEEP, source=Source(lab), work=work,
            progress=progress,
        )  # fmt: skip
        engine = EngineSettings(share_prompts=True)
        (mask,) = train_mask(
            problem, preset.mask, training, preset.export, 0.5, warm, preset.answer_tokens, engine
        )  # fmt: skip
        return mask

    def kill(step, total, metrics):
        if total == training.steps and step == 12:
            raise KilledError

    straight = train(None)
    with pytest.raises(KilledError):
        train(tmp_path, kill)
    seen = []
    resumed = train(tmp_path, lambda *done: seen.append(done[:2]))
    assert seen == [(11, 13), (12, 13), (13, 13)]  # of the training alone: the scores were kept as well
    ends = [{key: value.detach() for key, value in trainers[at].logits.values.items()} for at in (0, 2)]
    for key, value in ends[0].items():
        assert torch.equal(ends[1][key], value), key
        assert torch.equal(resumed.values[key], straight.values[key]), key
        assert value.unique().numel() > 3
    assert resumed.provenance["metrics"] == straight.provenance["metrics"]
    assert set(straight.provenance["metrics"]) >= ({"kl/pairs", "kl/task"} if name == "default" else {"nll/task"})


@pytest.mark.parametrize(
    "change",
    [
        {"settings": replace(SHORT, learning_rate=0.2)},
        {"tuned": "tuned2"},
        {"mask": {"initial": 1.0}},
        {"mask": {"granularity": "row"}},
        {"items": ITEMS[:-1]},
    ],
    ids=["settings", "task vectors", "first logits", "granularity", "items"],
)
def test_another_run_does_not_go_on_from_the_checkpoint(lab, tmp_path, change):
    trainer(lab, work=tmp_path, checkpoint_every=3).run()
    assert trainer(lab, work=tmp_path).resume() == 3
    assert trainer(lab, work=tmp_path, **change).resume() == 0


def test_another_start_does_not_go_on_from_the_checkpoint(lab, tmp_path):
    trainer(lab, work=tmp_path, checkpoint_every=3).run()
    model, values, _ = masked(lab)
    values.start_from(values.settings, {key: torch.ones_like(value) for key, value in values.values.items()})
    assert MaskTrainer(model, values, ITEMS, SHORT, pad_id=1, work=tmp_path).resume() == 0


def test_layers_without_gradient_are_checkpointed(lab, tmp_path):
    made = trainer(lab, work=tmp_path, checkpoint_every=3)
    made.logits.add("never used", (2, 2))
    made.optimizer.add_param_group({"params": [made.logits.values["never used"]]})
    made.run()
    assert made.resume() == 3


def test_paper_preset_against_the_published_loop(lab):
    """SOMF as METHODS §1 describes it, on plain tensors, without resafe's modules, losses or schedule."""
    paper = PRESETS["paper"]
    settings = replace(paper.training, steps=3, batch_size=3, seed=0)
    made = trainer(lab, settings, mask=vars(paper.mask))
    found = [made.step(step)["loss"] for step in range(3)]

    plain, seed = lab.plain(), 0
    weights = {name: value.detach() for name, value in plain.named_parameters()}
    (vector,) = masked(lab)[2]
    phi = {name: torch.zeros(vector.shape(name), requires_grad=True) for name in vector.names}
    optimizer = torch.optim.AdamW(phi.values(), lr=5e-3, weight_decay=0.0)

    def model_at(values, purpose, step):
        factors = {}
        for name in vector.names:
            u = uniform(tuple(vector.shape(name)), seed, "mask", purpose + name, str(step))
            m = torch.sigmoid((values[name] + u.log() - (1 - u).log()) / 0.5)
            factors[name] = vector.aligned(name) + vector.delta(name) * (m / m.mean())
        changed = dict(weights)
        for name in vector.names:
            if "lora_A" in name:
                target = name.removeprefix("base_model.model.").replace("lora_A.", "")
                product = factors[name.replace("lora_A", "lora_B")] @ factors[name]
                changed[target] = weights[target] + 8 / 4 * product
        return changed

    def log_probability(changed, sequence):
        ids = torch.tensor([sequence.prompt + sequence.answer])
        scores = functional_call(plain, changed, (ids,)).logits[0].log_softmax(-1)
        start = len(sequence.prompt)
        return sum(scores[start + at - 1, token] for at, token in enumerate(sequence.answer))

    for step in range(3):
        policy = model_at(phi, "", step)
        with torch.no_grad():
            reference = model_at({name: torch.zeros_like(value) for name, value in phi.items()}, "reference/", step)
        losses = []
        for item in made.batches.at(step):
            assert item.side == "safety"
            with torch.no_grad():
                base = log_probability(reference, item.chosen) - log_probability(reference, item.rejected)
            margin = log_probability(policy, item.chosen) - log_probability(policy, item.rejected) - base
            losses.append(-torch.log(torch.sigmoid(0.1 * margin)))
        loss = sum(losses) / len(losses)
        assert found[step] == pytest.approx(loss.item(), abs=1e-5)
        optimizer.param_groups[0]["lr"] = 5e-3 * 0.5 * (1 + math.cos(math.pi * step / 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in phi.items():
        torch.testing.assert_close(made.logits.values[name].detach(), value.detach(), rtol=1e-3, atol=2e-5)


def test_a_training_of_other_models_fusion_or_precision_is_another(lab):
    """A killed training is taken over by its own continuation alone."""
    first = trainer(lab).identity()
    assert trainer(lab).identity() == first
    assert trainer(lab, models="the same tensors, fused by TIES").identity() != first
    half = trainer(lab)
    half.model.to(torch.bfloat16)
    assert half.identity() != first


def test_a_compiler_that_fails_changes_no_identity(lab, monkeypatch):
    """Found out at the first step, it must not make the training's own checkpoints a stranger's."""
    made = trainer(lab, engine=EngineSettings(fused="on"))
    before = made.identity()
    made.logits.kernels._able = False
    assert made.identity() == before != trainer(lab).identity()
