"""Realign methods that need no model by hand, masks' families, and what is written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from resafe.deltas import task_vector
from resafe.errors import InputError
from resafe.fusion import Fusion
from resafe.masks import Mask, MaskSettings
from resafe.masks.concrete import scaled_mask
from resafe.realign import REALIGN, Problem, write_realigned
from resafe.realign.mask_family import mask_family
from resafe.registry import Registry
from resafe.tensors import bernoulli
from tests.tiny import KEEP, PAIRS, logits


def problem(lab, tuned=("tuned",), aligned="safe", **more):
    return Problem([task_vector(lab.open(name), lab.open(aligned)) for name in tuned], seed=4, **more)


def family(name, of, **settings):
    method = REALIGN.get(name)
    return method.function(of, **method.check(settings))


def check(of, realigned, wanted):
    """`wanted(name, aligned, deltas)` by tensor."""
    for name in of.names:
        expected = wanted(name, of.vectors[0].aligned(name), [vector.delta(name) for vector in of.vectors])
        torch.testing.assert_close(realigned(name), expected)


def test_interpolation(lab):
    of = problem(lab)
    found = family("interpolation", of, removed=[0.25, 0.5])
    assert found.strengths == (0.25, 0.5)
    check(of, found.at(0.25), lambda name, a, d: a + 0.75 * d[0])


def test_random_mask(lab):
    of = problem(lab)

    def kept(name, like):
        return bernoulli(tuple(like.shape), 0.7, 4, "random mask", name)

    check(of, family("random_mask", of).at(0.3), lambda n, a, d: a + kept(n, a) * d[0])
    check(of, family("random_mask", of, rescale=True).at(0.3), lambda n, a, d: a + kept(n, a) / 0.7 * d[0])
    with pytest.raises(InputError, match="nothing to rescale"):
        family("random_mask", of, rescale=True, removed=[1.0])
    with pytest.raises(InputError, match="nothing to rescale"):
        family("random_mask", of, rescale=True).at(1.0)


def test_dare_draws_each_model_apart_and_fuses(lab):
    of = problem(lab, ("tuned", "tuned2"), fusion=Fusion("average"))

    def kept(k, name, like):
        return bernoulli(tuple(like.shape), 0.5, 4, "dare", str(k), name) / 0.5

    check(of, family("dare", of).at(0.5), lambda n, a, d: a + sum(kept(k, n, a) * d[k] for k in range(2)) / 2)


def test_dare_drops_apart_from_what_its_fusion_drops(lab):
    """Both keep .7 of the entries: drawn apart .49 are left, and the mean is the task vector."""
    of = problem(lab, fusion=Fusion("dare", {"drop": 0.3}, seed=4))
    found = family("dare", of).at(0.3)
    left, entries = 0, 0
    for name in of.names:
        delta = of.vectors[0].delta(name)
        left += int((found(name) != of.vectors[0].aligned(name)).sum())
        entries += int((delta != 0).sum())
    assert left / entries == pytest.approx(0.49, abs=0.05)


def test_ties_trims_after_the_mask(lab):
    """F's thresholds are those of the masked task vectors, so halving every entry keeps the same entries."""
    of = problem(lab, ("tuned", "tuned2"), fusion=Fusion("ties", {"keep": 0.3, "weight": 1.0}))
    whole, half = family("interpolation", of).at(0.0), family("interpolation", of).at(0.5)
    for name in of.names:
        aligned = of.vectors[0].aligned(name)
        torch.testing.assert_close(half(name) - aligned, 0.5 * (whole(name) - aligned), rtol=1e-4, atol=1e-6)


def test_scaled_mask():
    mask = torch.tensor([0.0, 0.25, 1.0])
    assert scaled_mask(mask, 0.0).tolist() == [1, 1, 1]
    assert scaled_mask(mask, 0.5).tolist() == [0.5, 0.625, 1]
    assert scaled_mask(mask, 1.0).tolist() == mask.tolist()
    assert scaled_mask(mask, 1.2).tolist() == pytest.approx([0, 0.1, 1])


def values(of, seed=0):
    torch.manual_seed(seed)
    return {name: torch.rand(of.vectors[0].shape(name)) for name in of.names}


def test_mask_family(lab):
    of = problem(lab)
    mask = Mask.of(values(of), MaskSettings())
    found = mask_family(of, mask, (0.5, 1.0))
    assert (found.strengths, found.mask) == ((0.5, 1.0), mask)
    check(of, found.at(0.5), lambda n, a, d: a + (1 - 0.5 * (1 - mask.values[n])) * d[0])


def test_a_rescaled_mask_has_one_member(lab):
    of = problem(lab)
    mask = Mask.of(values(of), MaskSettings(rescale="mean"))
    found = mask_family(of, mask, (0.5, 1.0))
    assert found.strengths == (1.0,)
    with pytest.raises(InputError, match=r"strength 0\.5 of a mask that is divided by its mean"):
        found.at(0.5)
    check(of, found.at(1.0), lambda n, a, d: a + mask.values[n] / mask.values[n].mean() * d[0])


def test_shuffled_control_keeps_each_tensors_values(lab):
    of = problem(lab)
    mask = Mask.of({name: (value > 0.3).float() for name, value in values(of).items()}, MaskSettings())
    plain, mixed = (mask_family(of, mask, (1.0,), shuffle=shuffle).at(1.0) for shuffle in (False, True))
    for name in of.names:
        aligned, delta = of.vectors[0].aligned(name), of.vectors[0].delta(name)
        kept = [(realigned(name) - aligned).abs() > 0.5 * delta.abs() for realigned in (plain, mixed)]
        assert int(kept[0].sum()) == int(kept[1].sum()) == int(mask.values[name].sum())
        assert not torch.equal(kept[0], kept[1])


def test_masks_of_other_tensors(lab):
    of = problem(lab)
    some = values(of)
    name, value = some.popitem()
    with pytest.raises(InputError, match="no values for"):
        mask_family(of, Mask.of(some, MaskSettings()), (1.0,)).at(1.0)(name)
    with pytest.raises(InputError, match="no tensor for the mask's 'zzz'"):
        mask_family(of, Mask.of({**some, "zzz": value}, MaskSettings()), (1.0,))


def test_full_model_masks_leave_the_rest_aligned(lab):
    of = problem(lab, ("full_all",), "base")
    layer = "model.layers.0.mlp.down_proj.weight"
    half = torch.full(of.vectors[0].shape(layer), 1.0)
    found = mask_family(of, Mask.of({layer: half}, MaskSettings()), (1.0,)).at(1.0)
    check(of, found, lambda n, a, d: a + d[0] if n == layer else a)


@pytest.mark.parametrize(
    ("tuned", "aligned", "space"),
    [("tuned", "safe", "auto"), ("tuned", "safe", "weights"), ("full_all", "base", "auto")],
)
def test_what_is_written_loads_and_is_the_tuned_model_at_strength_0(lab, tmp_path, tuned, aligned, space):
    from transformers import AutoModelForCausalLM

    vectors = [task_vector(lab.open(tuned), lab.open(aligned), space)]
    of = Problem(vectors)
    out = write_realigned(tmp_path / "out", vectors, family("interpolation", of).at(0.0), lab.open(tuned), "card")
    adapter = (out / "adapter_config.json").is_file()
    assert adapter == (space == "auto" and tuned == "tuned")
    found = lab.adapted(out) if adapter else AutoModelForCausalLM.from_pretrained(out)
    wanted = lab.plain(tuned) if tuned == "full_all" else lab.adapted(tuned)
    torch.testing.assert_close(logits(found), logits(wanted), rtol=1e-4, atol=1e-5)
    assert (out / "README.md").read_text() == "card"


def test_examples_for_further_training(lab):
    of = problem(lab, pairs=PAIRS, keep=KEEP)
    found = of.sft_examples(20)
    sides = [example.id.split("-")[0] for example in found]
    assert [sides.count(side) for side in ("safety", "harmless", "task")] == [8, 8, 4]
    assert {e.response for e in found if e.id.startswith("safety")} <= {pair.chosen for pair in PAIRS}
    assert found == of.sft_examples(20)
    other = [example.id.split("-")[0] for example in of.sft_examples(20, {"safety": 0.25, "harmless": 0.75})]
    assert [other.count(side) for side in ("safety", "harmless", "task")] == [5, 15, 0]
    with pytest.raises(InputError, match="shares: harmful: 0.5"):
        of.sft_examples(20, {"harmful": 0.5})
    with pytest.raises(InputError, match="needs the model and data"):
        of.models()


def test_plug_ins_of_other_packages(monkeypatch):
    registry = Registry("realign method", "resafe.realign")

    def load():
        registry.register("theirs", title="t", source="s")(lambda problem: None)

    def entry_points(*, group):
        assert group == "resafe.realign"
        return [SimpleNamespace(load=load)]

    monkeypatch.setattr("resafe.registry.metadata.entry_points", entry_points)
    assert registry.get("theirs").title == "t"
