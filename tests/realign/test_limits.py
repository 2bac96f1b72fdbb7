"""What a removal may not touch: what agrees with the safety vector, and the task's loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resafe.deltas import task_vector
from resafe.errors import InputError
from resafe.masks import MaskSettings
from resafe.provenance import described
from resafe.realign.orthogonal import orthogonal_removal, orthogonal_scores
from resafe.realign.safety import SafetyVector, agreements, safety_vector
from resafe.realign.scores import encoded_items, mask_gradients, masked_model
from tests.realign.test_learned import learnable
from tests.realign.test_methods import family


def test_in_factor_space_the_sign_is_that_of_the_inner_product_with_v(lab):
    """τ · ∂⟨W, V⟩/∂θ against autograd on s B A, at the tuned factors."""
    of = learnable(lab)
    _, logits = masked_model(of, MaskSettings(), 0)
    found = agreements(logits, of, safety_vector(of, None, None))
    (vector,) = of.vectors
    for a, b, scale in vector.factor_modules().values():
        tuned = {name: (vector.aligned(name) + vector.delta(name)).requires_grad_() for name in (a, b)}
        v = scale * vector.aligned(b) @ vector.aligned(a)  # the base has no adapter
        ((scale * tuned[b] @ tuned[a]) * v).sum().backward()
        for name in (a, b):
            torch.testing.assert_close(found[name], vector.delta(name) * tuned[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("granularity", ["row", "rank", "head", "tensor", "layer"])
def test_what_shares_a_logit_is_added_up(lab, granularity):
    of = learnable(lab)
    safety = safety_vector(of, None, None)
    _, entries = masked_model(of, MaskSettings(), 0)
    _, logits = masked_model(of, MaskSettings(granularity=granularity, head_size=8), 0)
    fine, coarse = agreements(entries, of, safety), agreements(logits, of, safety)
    assert {key: value.shape for key, value in coarse.items()} == {k: v.shape for k, v in logits.values.items()}
    assert sum(float(v.sum()) for v in coarse.values()) == pytest.approx(
        sum(float(v.sum()) for v in fine.values()), rel=1e-4
    )
    if granularity == "rank":
        a = next(name for name in of.names if "q_proj.lora_A" in name)
        wanted = fine[a].sum(1) + fine[a.replace("lora_A", "lora_B")].sum(0)
        torch.testing.assert_close(coarse[a.replace("lora_A", "lora")], wanted)


def test_of_whole_models_v_is_the_difference(lab):
    full, base, adapted = (lab.open(name) for name in ("full", "base", "safe"))
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(SafetyVector(full, base).weight(name), full.read(name) - base.read(name))
    product = task_vector(adapted, base, "weights").delta(name)
    assert torch.equal(SafetyVector(adapted, base).weight(name), product)
    torch.testing.assert_close(SafetyVector(base, adapted).weight(name), -product)
    torch.testing.assert_close(SafetyVector(adapted, full).weight(name), base.read(name) + product - full.read(name))


def test_which_model_came_before(lab):
    of = learnable(lab, tuned=("full",), aligned="base")
    with pytest.raises(InputError, match="what it was before alignment is not known"):
        family("somf", of, steps=0, conflict_only=True)
    with pytest.raises(InputError, match="both given"):
        family("selector", of, conflict_only=True, base="a", unaligned="b")
    for method in ("somf", "selector"):
        with pytest.raises(InputError, match="used by conflict_only"):
            family(method, of, base="a")


def test_only_what_conflicts_is_removed(lab):
    unaligned = str(lab.root / "full2")
    of = learnable(lab, tuned=("full",), aligned="base")
    found = family("somf", of, steps=4, batch_size=5, learning_rate=0.5, conflict_only=True, unaligned=unaligned)
    removed = 0
    for name, mask in found.mask.values.items():
        v = lab.open("base").read(name) - lab.open("full2").read(name)
        against = of.vectors[0].delta(name) * v < 0
        assert bool((mask[~against] == 1).all())
        removed += int((mask[against] < 1).sum())
        assert float(mask[against].std()) > 1e-3  # the others have learnt
    assert removed > 1000
    picked = family("selector", of, shares=[0.4], examples=2, conflict_only=True, unaligned=unaligned)
    gone = 0
    for name in found.mask.values:
        changed = picked.at(0.4)(name) != of.vectors[0].aligned(name) + of.vectors[0].delta(name)
        v = lab.open("base").read(name) - lab.open("full2").read(name)
        assert not bool((changed & (of.vectors[0].delta(name) * v >= 0)).any())
        gone += int(changed.sum())
    assert gone > 100


def test_an_export_removes_nothing_that_does_not_conflict(lab):
    """top_k keeps a share of everything, and what agrees with the safety vector is more than that share."""
    unaligned = str(lab.root / "full2")
    of = learnable(lab, tuned=("full",), aligned="base")
    found = family("somf", of, steps=2, batch_size=5, export="top_k", keep=0.2, conflict_only=True, unaligned=unaligned)
    for name, mask in found.mask.values.items():
        v = lab.open("base").read(name) - lab.open("full2").read(name)
        assert bool((mask[of.vectors[0].delta(name) * v >= 0] == 1).all())
    with pytest.raises(InputError, match="layer_budget holds the mask as it is learnt"):
        family("somf", of, steps=1, layer_budget=0.9, export="threshold")


def test_masks_of_their_own_conflict_on_their_own(lab):
    of = learnable(lab, tuned=("full", "full_all"), aligned="base")
    found = family(
        "somf", of, steps=2, batch_size=5, conflict_only=True, per_task=True, unaligned=str(lab.root / "full2")
    )
    for mask, vector in zip(found.masks, of.vectors, strict=True):
        for name, value in mask.values.items():
            v = lab.open("base").read(name) - lab.open("full2").read(name)
            assert bool(((value == 1) | (vector.delta(name) * v < 0)).all())


def test_the_nearest_removal_that_spares_the_loss():
    """Against a projection computed by brute force: the mask is nearest among those with ⟨1 − m, a⟩ ≥ 0."""
    masks = {"a": torch.tensor([0.2, 0.9]), "b": torch.tensor([[0.5], [1.0]])}
    gradient = {"a": torch.tensor([-1.0, 2.0]), "b": torch.tensor([[0.5], [9.0]])}
    found = orthogonal_removal(masks, gradient)
    kept = torch.cat([found["a"], found["b"].flatten()])
    assert float(kept[3]) == 1.0  # kept whole before, kept whole now
    a = torch.tensor([-1.0, 2.0, 0.5])
    assert float((1 - kept[:3]) @ a) == pytest.approx(0, abs=1e-6)
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 101)] * 3)
    fine = grid[(1 - grid) @ a >= -1e-6]
    best = fine[(fine - torch.tensor([0.2, 0.9, 0.5])).square().sum(1).argmin()]
    torch.testing.assert_close(kept[:3], best, rtol=0, atol=0.012)
    helps = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.5], [-9.0]])}
    assert all(torch.equal(orthogonal_removal(masks, helps)[key], masks[key]) for key in masks)
    bad = orthogonal_removal(masks, {"a": torch.tensor([-1.0, -2.0]), "b": torch.tensor([[-3.0], [-9.0]])})
    assert all(torch.allclose(mask, torch.ones_like(mask), atol=1e-6) for mask in bad.values())  # nothing may go


def test_scores_without_what_changes_other_losses():
    torch.manual_seed(0)
    scores, one, two = ({"a": torch.randn(20), "b": torch.randn(3, 4)} for _ in range(3))
    found = orthogonal_scores(scores, [one, two, {key: torch.zeros_like(v) for key, v in one.items()}])
    flat = [torch.cat([part["a"], part["b"].flatten()]) for part in (found, one, two, scores)]
    assert abs(float(flat[0] @ flat[1])) < 1e-5 and abs(float(flat[0] @ flat[2])) < 1e-5
    span = torch.stack(flat[1:3]).T
    wanted = flat[3] - span @ torch.linalg.lstsq(span, flat[3][:, None]).solution[:, 0]
    torch.testing.assert_close(flat[0], wanted, rtol=1e-4, atol=1e-5)


def test_an_orthogonal_mask_costs_the_task_less(lab):
    of = learnable(lab)
    learning = {
        "preset": "labels", "steps": 4, "batch_size": 5, "learning_rate": 0.5, "answer_tokens": 3,
        "shares": {"safety": 1.0},
    }  # fmt: skip
    plain, spared = (family("somf", of, **learning, orthogonal=orthogonal) for orthogonal in (False, True))
    assert spared.mask.provenance["orthogonal"] is True and "orthogonal" not in plain.mask.provenance
    items, pad = encoded_items(of)
    task = [item for item in items if item.side == "task"]
    model, logits = masked_model(of, MaskSettings(sampling="direct", initial=1.0), 0)

    def loss(mask):
        logits.start_from(logits.settings, mask.values)
        seen = []
        mask_gradients(model, logits, task, {"task": 1.0}, pad, lambda *report: seen.append(report[2]["loss"]))
        return sum(seen)

    assert loss(spared.mask) < loss(plain.mask) - 1e-3
    removed = sum(float((1 - mask).sum()) for mask in spared.mask.values.values())
    assert removed > 100
    with pytest.raises(InputError, match="needs examples of the task"):
        family("somf", replace(of, keep=()), steps=1, batch_size=2, orthogonal=True)
    with pytest.raises(InputError, match="rescale none"):
        family("somf", of, steps=1, batch_size=2, orthogonal=True, rescale="mean")


def test_the_selector_with_orthogonal_scores_and_a_budget(lab):
    of = learnable(lab)
    plain, spared = (family("selector", of, shares=[0.3], examples=2, orthogonal=o) for o in (False, True))
    assert any(not torch.equal(plain.at(0.3)(name), spared.at(0.3)(name)) for name in of.names)
    held = family("selector", of, shares=[0.1, 0.3], examples=2, layer_budget={"0": 1.0, "1": 0.9})
    gone = {0: 0, 1: 0}
    for name in of.names:
        changed = held.at(0.3)(name) != of.vectors[0].aligned(name) + of.vectors[0].delta(name)
        gone[0 if ".layers.0." in name else 1] += int(changed.sum())
    size = sum(of.vectors[0].delta(name).numel() for name in of.names if ".layers.1." in name)
    assert gone[0] == 0 and 0.05 * size < gone[1] <= 0.1 * size


NOTHING = (None, False, "gradient", "float32", "auto")


def test_settings_that_came_later_change_no_digest():
    """At their defaults they are not described; stages of earlier runs stay valid."""
    from resafe.masks import TrainSettings
    from resafe.realign import REALIGN

    assert "layer_budget" not in described(TrainSettings())
    assert described(TrainSettings(layer_budget=0.9))["layer_budget"] == 0.9
    for name in ("somf", "selector"):
        method = REALIGN.get(name)
        later = [p for p in method.parameters if p.name in method.traits["later"]]
        assert len(later) == len(method.traits["later"]) and all(p.default in NOTHING for p in later)


@pytest.mark.parametrize("kind", ["magnitude", "sign_agreement", "fisher"])
def test_warm_starts_from_cheap_scores(lab, kind, tmp_path):
    of = learnable(lab, tmp_path)
    found = family("somf", of, steps=0, warm_share=0.1, warm_scores=kind)
    entries = torch.cat([found.mask.values[name].flatten() for name in of.names])
    low = entries < 0.5
    deltas = torch.cat([of.vectors[0].delta(name).flatten() for name in of.names]).abs()
    if kind != "fisher":
        assert float(low.float().mean()) == pytest.approx(0.1, abs=1 / len(entries))
    else:
        assert 0 < float(low.float().mean()) <= 0.1 + 1 / len(entries)
    if kind == "magnitude":
        assert float(deltas[low].max()) <= float(deltas[~low].min())
    if kind == "sign_agreement":
        _, logits = masked_model(of, MaskSettings(), 0)
        toward = agreements(logits, of, safety_vector(of, None, None))
        flat = torch.cat([toward[name].flatten() for name in of.names])
        assert float(flat[low].max()) <= float(flat[~low].min()) and float(flat[low].max()) < 0


def test_what_did_not_change_is_not_removed_for_its_magnitude(lab):
    of = learnable(lab, tuned=("full2",), aligned="base")
    found = family("somf", of, steps=0, warm_share=0.1, warm_scores="magnitude")
    low = {key: value < 0.5 for key, value in found.mask.values.items()}
    changed = {key: of.vectors[0].delta(key) != 0 for key in low}
    assert sum(int(value.sum()) for value in low.values()) > 100
    assert not any(bool((low[key] & ~changed[key]).any()) for key in low)


def test_coarse_magnitudes_are_means(lab):
    found = family("somf", learnable(lab), steps=0, warm_share=0.25, warm_scores="magnitude", granularity="tensor")
    of = learnable(lab)
    sizes = {name: float(of.vectors[0].delta(name).abs().mean()) for name in of.names}
    removed = [name for name in of.names if float(found.mask.values[name]) < 0.5]
    assert set(removed) == set(sorted(sizes, key=sizes.get)[:2]) and len(of.names) == 8
