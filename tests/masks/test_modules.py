"""Masked models against PEFT's and transformers' own models with the same weights."""

from __future__ import annotations

import pytest
import torch

from resafe.deltas import task_vector
from resafe.errors import InputError
from resafe.fusion import Fusion
from resafe.masks import MaskSettings, install_masks
from tests.tiny import logits


def masked(lab, tuned=("tuned",), aligned="safe", fusion=None, base="base", space="auto", **settings):
    vectors = [task_vector(lab.open(name), lab.open(aligned), space) for name in tuned]
    fusion = fusion or Fusion("task_arithmetic")
    statistics = fusion.statistics(vectors[0].names, lambda name: [v.delta(name) for v in vectors])
    model = lab.plain(base)
    values = install_masks(
        model,
        vectors,
        MaskSettings(**settings),
        seed=0,
        combine=lambda name, deltas: fusion.combine(name, deltas, statistics),
        linear=fusion.linear,
    )
    return model, values, vectors


def with_factors(lab, tensors):
    """PEFT's model with the given adapter tensors, by the names they are saved under."""
    model = lab.adapted("safe")
    state = model.state_dict()
    with torch.no_grad():
        for name, value in tensors.items():
            state[name.replace(".weight", ".default.weight")].copy_(value)
    return model


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["entry", "row", "column", "rank", "tensor", "layer"])
def test_ones_are_the_tuned_adapter_and_zeros_the_safe_one(lab, granularity):
    model, values, _ = masked(lab, granularity=granularity)
    with values.reading("ones"):
        same(logits(model), logits(lab.adapted("tuned")))
    with values.reading("zeros"):
        same(logits(model), logits(lab.adapted("safe")))
    assert not torch.allclose(logits(lab.adapted("tuned")), logits(lab.adapted("safe")), atol=0.01)


@pytest.mark.parametrize(("tuned", "aligned", "space"), [("full", "base", "auto"), ("tuned", "safe", "weights")])
def test_full_weights(lab, tuned, aligned, space):
    model, values, _ = masked(lab, (tuned,), aligned, space=space)
    new, old = (lab.plain(n) if n in ("full", "base") else lab.adapted(n) for n in (tuned, aligned))
    with values.reading("ones"):
        same(logits(model), logits(new))
    with values.reading("zeros"):
        same(logits(model), logits(old))


@pytest.mark.parametrize("rescale", ["none", "mean"])
def test_rank_masks_reach_the_row_of_a_and_the_column_of_b(lab, rescale):
    model, values, (vector,) = masked(lab, granularity="rank", sampling="direct", rescale=rescale)
    torch.manual_seed(0)
    tensors = {}
    for name in vector.names:
        key = name.replace("lora_A", "lora").replace("lora_B", "lora")
        if "lora_A" in name:
            values.values[key].data = torch.rand(4)
        mask = values.values[key].detach()
        mask = mask / mask.mean() if rescale == "mean" else mask
        mask = mask.reshape(4, 1) if "lora_A" in name else mask.reshape(1, 4)
        tensors[name] = vector.aligned(name) + mask * vector.delta(name)
    assert len(values.values) == 4
    same(logits(model), logits(with_factors(lab, tensors)))


def test_heads_and_norms_by_hand(lab):
    model, values, (vector,) = masked(
        lab, granularity="head", head_size=8, sampling="direct", rescale="norm", initial=1.0
    )
    torch.manual_seed(0)
    tensors = {}
    for name in vector.names:
        values.values[name].data = torch.rand(values.values[name].shape)
        mask, delta = values.values[name].detach(), vector.delta(name)
        if "q_proj.lora_B" in name:
            assert mask.shape == (4, 1)  # four heads of eight rows
            mask = mask.repeat_interleave(8, 0)
        else:
            assert mask.shape == (1, 1)
        tensors[name] = vector.aligned(name) + mask * delta * (delta.norm() / (mask * delta).norm())
    same(logits(model), logits(with_factors(lab, tensors)))


def test_norms_of_two_task_vectors_are_kept_apart(lab):
    model, values, vectors = masked(
        lab, ("tuned", "tuned2"), fusion=Fusion("average"), sampling="direct", rescale="norm", initial=1.0
    )
    torch.manual_seed(0)
    tensors = {}
    for name in vectors[0].names:
        mask = values.values[name].data = torch.rand(values.values[name].shape)
        deltas = [vector.delta(name) for vector in vectors]
        kept = [mask * delta * (delta.norm() / (mask * delta).norm()) for delta in deltas]
        tensors[name] = vectors[0].aligned(name) + sum(kept) / 2
    same(logits(model), logits(with_factors(lab, tensors)))


@pytest.mark.parametrize("fusion", [Fusion("average"), Fusion("ties", {"keep": 0.3}), Fusion("dare", seed=3)])
def test_two_task_vectors(lab, fusion):
    model, values, vectors = masked(lab, ("tuned", "tuned2"), fusion=fusion, initial=1.5)
    names = vectors[0].names

    def deltas(name):
        return [vector.delta(name) for vector in vectors]

    statistics = fusion.statistics(names, deltas)
    m = torch.sigmoid(torch.tensor(1.5))
    with values.reading("ones"):
        full = {n: vectors[0].aligned(n) + fusion.combine(n, deltas(n), statistics) for n in names}
        same(logits(model), logits(with_factors(lab, full)))
    soft = {n: vectors[0].aligned(n) + fusion.combine(n, [m * d for d in deltas(n)], statistics) for n in names}
    same(logits(model), logits(with_factors(lab, soft)))


def test_only_the_logits_learn(lab):
    model, values, _ = masked(lab)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in values.parameters())
    assert values.removed_share().item() == pytest.approx(0.5)


def test_the_digest_tells_task_vectors_apart(lab):
    digests = [masked(lab, (name,))[1].vectors_digest for name in ("tuned", "tuned", "tuned2")]
    assert digests[0] == digests[1] != digests[2]


def test_what_does_not_fit(lab):
    vectors = [task_vector(lab.open(name), lab.open("base")) for name in ("tuned", "full")]
    common = {"seed": 0, "combine": lambda name, deltas: deltas[0], "linear": True}
    with pytest.raises(InputError, match="cover different tensors"):
        install_masks(lab.plain(), vectors, MaskSettings(), **common)
    with pytest.raises(InputError, match="no linear layer"):
        install_masks(torch.nn.Linear(2, 2), vectors[:1], MaskSettings(), **common)
