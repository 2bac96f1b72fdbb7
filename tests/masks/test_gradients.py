"""Gradients of the loop through each fusion, against the same model written out by hand and against differences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from resafe.fusion import Fusion
from resafe.masks import MaskTrainer, TrainSettings, encode_items
from resafe.masks.losses import length_groups
from resafe.tensors import bernoulli
from tests.evals.tiny import tiny_tokenizer
from tests.masks.test_modules import masked
from tests.tiny import KEEP, PAIRS

ITEMS = encode_items(tiny_tokenizer(), None, PAIRS, KEEP)
BATCH = [ITEMS[0], ITEMS[3], ITEMS[7], ITEMS[11]]
KINDS = ["average", "task_arithmetic", "ties", "dare"]
FUSIONS = {
    "average": Fusion("average"),
    "task_arithmetic": Fusion("task_arithmetic", {"weight": 0.7}),
    "ties": Fusion("ties", {"keep": 0.3, "weight": 0.9}),
    "dare": Fusion("dare", {"drop": 0.2, "weight": 0.6}, seed=3),
}


def ready(lab, fusion, per_task, **settings):
    """A trainer at random logits, and the task vectors."""
    model, values, vectors = masked(lab, ("tuned", "tuned2"), fusion=fusion, per_task=per_task)
    torch.manual_seed(0)
    for key in sorted(values.values):
        values.values[key].data = torch.randn(values.values[key].shape)
    return MaskTrainer(model, values, ITEMS, TrainSettings(**settings), pad_id=1), vectors


def fused(kind, parts):
    """F of {name: [m ⊙ τ_1, m ⊙ τ_2]} as the papers have it; trims, signs and drops are constants to the gradient."""
    if kind == "average":
        return {name: (a + b) / 2 for name, (a, b) in parts.items()}
    if kind == "task_arithmetic":
        return {name: 0.7 * (a + b) for name, (a, b) in parts.items()}
    if kind == "dare":
        return {
            name: 0.6
            * sum(part * bernoulli(part.shape, 0.8, 3, "dare", f"model {k}", name) / 0.8 for k, part in enumerate(both))
            for name, both in parts.items()
        }
    bounds = []
    for k in range(2):
        sizes = torch.cat([both[k].detach().flatten().abs() for both in parts.values()])
        bounds.append(sizes.sort(descending=True).values[round(0.3 * len(sizes)) - 1])
    found = {}
    for name, both in parts.items():
        kept = [part * (part.detach().abs() >= bound) for part, bound in zip(both, bounds, strict=True)]
        sign = (kept[0] + kept[1]).detach().sign()
        agree = [(part.detach().sign() == sign) & (part.detach() != 0) for part in kept]
        count = (agree[0].float() + agree[1].float()).clamp_min(1)
        found[name] = 0.9 * (kept[0] * agree[0] + kept[1] * agree[1]) / count
    return found


def by_hand(lab, kind, phi, vectors, per_task):
    """The mean over the batch of −log p a token, one sequence at a time, on plain merged weights."""
    parts = {
        name: [
            torch.sigmoid(phi[f"task{k}:{name}" if per_task else name]) * vector.delta(name)
            for k, vector in enumerate(vectors)
        ]
        for name in vectors[0].names
    }
    factors = {name: vectors[0].aligned(name) + delta for name, delta in fused(kind, parts).items()}
    plain = lab.plain()
    weights = {name: value.detach() for name, value in plain.named_parameters()}
    for name in factors:
        if "lora_A" in name:
            target = name.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[target] = weights[target] + 8 / 4 * factors[name.replace("lora_A", "lora_B")] @ factors[name]
    losses = []
    for item in BATCH:
        ids = torch.tensor([item.chosen.prompt + item.chosen.answer])
        scores = functional_call(plain, weights, (ids,)).logits[0].log_softmax(-1)
        start, answer = len(item.chosen.prompt), torch.tensor(item.chosen.answer)
        losses.append(-scores[start - 1 : -1].gather(1, answer[:, None]).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("per_task", [False, True], ids=["one mask", "a mask a task"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_hand(lab, kind, per_task):
    made, vectors = ready(lab, FUSIONS[kind], per_task)
    loss, _ = made.loss(BATCH)
    loss.backward()
    phi = {key: value.detach().clone().requires_grad_() for key, value in made.logits.values.items()}
    wanted = by_hand(lab, kind, phi, vectors, per_task)
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    untouched = 0
    for key, value in made.logits.values.items():
        torch.testing.assert_close(value.grad, phi[key].grad, rtol=1e-3, atol=1e-7)
        assert float(value.grad.abs().sum()) > 0
        untouched += int((value.grad == 0).sum())
    if kind == "ties":  # nothing flows through what is trimmed
        assert untouched > sum(value.numel() for value in phi.values()) / 4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_differences(lab, kind):
    """Along the gradient the loss changes by its norm. TIES without its trim, at whose threshold the loss jumps."""
    fusion = Fusion("ties", {"keep": 1.0, "weight": 0.9}) if kind == "ties" else FUSIONS[kind]
    made, _ = ready(lab, fusion, per_task=False)
    made.loss(BATCH)[0].backward()
    gradients = {key: value.grad.clone() for key, value in made.logits.values.items()}
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for key, value in made.logits.values.items():
                value += sign * (1 if sign > 0 else 2) * 0.05 * gradients[key] / norm
            ends.append(float(made.loss(BATCH)[0]))
    assert (ends[0] - ends[1]) / 0.1 == pytest.approx(float(norm), rel=5e-3)


def towards(lab, values, vector, items, teacher):
    """KL(π_teacher ‖ π) a token and the mean loss of the items' answers, and the logits φ that they hang on."""
    plain = lab.plain()
    weights = {name: value.detach() for name, value in plain.named_parameters()}
    phi = {key: value.detach().clone().requires_grad_() for key, value in values.values.items()}
    weights |= {name: vector.aligned(name) + torch.sigmoid(value) * vector.delta(name) for name, value in phi.items()}
    divergences, losses = [], []
    for item in items:
        ids = torch.tensor([item.chosen.prompt + item.chosen.answer])
        start, answer = len(item.chosen.prompt), torch.tensor(item.chosen.answer)
        with torch.no_grad():
            theirs = teacher(ids).logits[0, start - 1 : -1].log_softmax(-1)
        ours = functional_call(plain, weights, (ids,)).logits[0, start - 1 : -1].log_softmax(-1)
        divergences.append((theirs.exp() * (theirs - ours)).sum(1))
        losses.append(-ours.gather(1, answer[:, None]).mean())
    return torch.cat(divergences).mean(), torch.stack(losses).mean(), phi


def test_task_divergence_over_full_weights(lab):
    """KL(π_tuned ‖ π) a token on the task's answers, and its gradient, with every linear layer's weight masked."""
    model, values, (vector,) = masked(lab, ("full",), "base", initial=0.5)
    task = [item for item in ITEMS if item.side == "task"]
    made = MaskTrainer(model, values, ITEMS, TrainSettings(task_divergence=0.7), pad_id=1)
    loss, metrics = made.loss(task)
    loss.backward()

    divergence, mean, phi = towards(lab, values, vector, task, lab.plain("full"))
    assert len(phi) == 14 and all("_proj" in key for key in phi)
    assert float(divergence) > 1e-3
    assert metrics["kl/task"] == pytest.approx(float(divergence), rel=1e-4)
    wanted = mean + 0.7 * divergence
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    for key, value in values.values.items():
        torch.testing.assert_close(value.grad, phi[key].grad, rtol=1e-3, atol=1e-7)
    with values.reading("ones"):
        same = made.loss(task)[1]["kl/task"]
    assert abs(same) < 1e-6


def test_distillation_has_the_right_teacher_for_each_side(lab):
    """(n_pairs KL(π_aligned ‖ π) + n_task KL(π_tuned ‖ π)) / n and its gradient; labels play no part."""
    model, values, (vector,) = masked(lab, ("full",), "base", initial=0.5)
    pairs, task = ([i for i in ITEMS if (i.side == "task") == side] for side in (False, True))
    made = MaskTrainer(model, values, ITEMS, TrainSettings(loss="distill"), pad_id=1)
    loss, metrics = made.loss([*task, *pairs])
    loss.backward()

    gradients = {key: torch.zeros_like(value) for key, value in values.values.items()}
    total = 0.0
    for name, few, teacher in (("pairs", pairs, lab.plain()), ("task", task, lab.plain("full"))):
        divergence, _, phi = towards(lab, values, vector, few, teacher)
        assert float(divergence) > 1e-3
        assert metrics[f"kl/{name}"] == pytest.approx(float(divergence), rel=1e-4)
        part = divergence * len(few) / len(ITEMS)
        part.backward()
        total += float(part)
        gradients = {key: gradients[key] + value.grad for key, value in phi.items()}
    assert float(loss) == pytest.approx(total, rel=1e-4)
    for key, value in values.values.items():
        torch.testing.assert_close(value.grad, gradients[key], rtol=1e-3, atol=1e-7)
    for reading, name in (("zeros", "kl/pairs"), ("ones", "kl/task")):
        with values.reading(reading):
            assert abs(made.loss(ITEMS)[1][name]) < 1e-6


@pytest.mark.parametrize("settings", [{"loss": "distill"}, {"loss": "sft", "task_divergence": 0.7}])
def test_of_several_tuned_models_each_teaches_its_own_examples(lab, settings):
    """KL(π_k ‖ π) of an example of task k, a token over all of them; what F makes of both teaches none."""
    items = encode_items(tiny_tokenizer(), None, PAIRS, KEEP, keep_of=[1, 0, 1])
    task = [item for item in items if item.side == "task"]
    assert [item.task for item in task] == [1, 0, 1] and {item.task for item in items if item.side != "task"} == {None}
    model, values, _ = masked(lab, ("tuned", "tuned2"), fusion=FUSIONS["ties"], apart=True, initial=0.5)
    made = MaskTrainer(model, values, items, TrainSettings(**settings), pad_id=1)
    teachers, divergences = [lab.adapted("tuned"), lab.adapted("tuned2")], []
    for item in task:
        ids, start = torch.tensor([item.chosen.prompt + item.chosen.answer]), len(item.chosen.prompt)
        with torch.no_grad():
            theirs, ours = (m(ids).logits[0, start - 1 : -1].log_softmax(-1) for m in (teachers[item.task], model))
        divergences.append((theirs.exp() * (theirs - ours)).sum(1))
    wanted = float(torch.cat(divergences).mean())
    assert made.loss(task)[1]["kl/task"] == pytest.approx(wanted, rel=1e-4)
    for place in (0, 1):
        with values.reading(place):
            assert abs(made.loss([item for item in task if item.task == place])[1]["kl/task"]) < 1e-6
            assert made.loss([item for item in task if item.task != place])[1]["kl/task"] > 1e-3

    model, values, _ = masked(lab, ("tuned", "tuned2"), fusion=FUSIONS["ties"], initial=0.5)  # nobody asked for it
    made = MaskTrainer(model, values, items, TrainSettings(**settings), pad_id=1)
    assert made.loss(task)[1]["kl/task"] != pytest.approx(wanted, rel=1e-2)
    with values.reading("ones"):
        assert abs(made.loss(task)[1]["kl/task"]) < 1e-6


def test_task_divergence_over_full_weights_keeps_the_task(lab):
    """Beside the safety pairs alone the price holds the model nearer to the tuned one on the task."""
    settings = TrainSettings(
        steps=10, batch_size=6, warmup_steps=1, learning_rate=0.3, shares={"safety": 0.5, "task": 0.5}
    )
    found = []
    for weight in (1e-9, 20.0):
        model, values, _ = masked(lab, ("full",), "base", initial=1.0)
        made = MaskTrainer(model, values, ITEMS, replace(settings, task_divergence=weight), pad_id=1)
        made.run()
        with torch.no_grad():
            found.append(made.loss([item for item in ITEMS if item.side == "task"])[1]["kl/task"])
    assert found[1] < 0.7 * found[0]


@pytest.mark.parametrize("side", ["safety", "task"])
def test_a_divergence_by_length_is_the_same_mean_over_tokens(lab, side):
    """Short and long sequences apart or in one batch: the same value and gradients, whoever teaches."""
    found = []
    few = [replace(item, side=side) for item in ITEMS]
    tokens = sum(len(item.chosen.answer) for item in few)
    assert len(length_groups([len(item.chosen) for item in few], 0.1)) > 1
    for cost in (math.inf, 0.1):
        model, values, _ = masked(lab, ("full",), "base", initial=0.5)
        made = MaskTrainer(model, values, few, TrainSettings(loss="distill", shares={side: 1.0}), pad_id=1)
        made._pass_cost = cost
        divergence = made._divergences(few).sum() / tokens
        divergence.backward()
        found.append((divergence.detach(), {key: value.grad for key, value in values.values.items()}))
    assert float(found[0][0]) > 1e-3
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, rtol=0, atol=1e-6)
