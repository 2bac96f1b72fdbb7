"""A mask file as a fusion: read in parts, through files, against what realignment gives in memory."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from resafe.api import realign
from resafe.checkpoints import load_model, open_checkpoint
from resafe.deltas import task_vector
from resafe.engine import Input, Request, build_plan, execute, spans
from resafe.errors import InputError
from resafe.fusion import Fusion
from resafe.masks import Mask, MaskSettings, StoredMask
from resafe.masks.concrete import logits_key, logits_shape
from resafe.realign import Problem
from resafe.realign.mask_family import mask_family


def random_mask(shapes, granularity="entry", binary=False, rescale="none", **provenance):
    """A mask over tensors of these names and shapes."""
    generator, values = torch.Generator().manual_seed(len(granularity)), {}
    for name, shape in shapes.items():
        wanted = logits_shape(name, tuple(shape), MaskSettings(granularity=granularity))
        drawn = torch.rand(wanted, generator=generator)
        values.setdefault(logits_key(name, granularity), (drawn > 0.4).float() if binary else drawn)
    return Mask.of(values, MaskSettings(granularity=granularity, rescale=rescale), provenance)


SHAPES = {"m.lora_A.weight": (4, 9), "m.lora_B.weight": (7, 4)}
WEIGHTS = {"w": (5, 3, 9), "v": (11,), "q": (6, 7)}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("rescale", ["none", "mean"])
@pytest.mark.parametrize("granularity", ["entry", "row", "column", "tensor", "rank"])
def test_every_part_is_that_of_the_whole_mask(tmp_path, granularity, rescale, binary):
    shapes = SHAPES if granularity == "rank" else WEIGHTS
    mask = random_mask(shapes, granularity, binary, rescale)
    mask.save(tmp_path)
    stored = StoredMask.open(tmp_path)
    assert stored.bits == (1 if binary else 8)
    for name, shape in shapes.items():
        whole = mask.weight(name).expand(shape).reshape(-1, shape[-1])
        for start in range(len(whole)):
            for stop in range(start, len(whole) + 1):
                part = stored.part(name, shape, (start, stop)).expand(stop - start, shape[-1])
                if rescale == "none":
                    assert torch.equal(part, whole[start:stop])
                else:
                    torch.testing.assert_close(part, whole[start:stop], rtol=1e-6, atol=0)
        torch.testing.assert_close(stored.whole(name, shape), mask.weight(name).expand(shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rescale", ["none", "mean"])
def test_parts_of_a_mask_over_heads(tmp_path, rescale):
    shapes = {
        "l.0.q_proj.weight": (6, 5),
        "l.0.o_proj.weight": (5, 6),
        "l.0.up_proj.weight": (4, 5),
        "l.0.q_proj.bias": (6,),
    }
    settings = MaskSettings(granularity="head", head_size=2, rescale=rescale)
    torch.manual_seed(0)
    mask = Mask.of({name: torch.rand(logits_shape(name, shape, settings)) for name, shape in shapes.items()}, settings)
    mask.save(tmp_path)
    stored = StoredMask.open(tmp_path)
    assert not stored.problems(shapes)
    for name, shape in shapes.items():
        whole = mask.weight(name).expand(shape).reshape(-1, shape[-1])
        for start in range(len(whole)):
            part = stored.part(name, shape, (start, start + 1)).expand(1, shape[-1])
            torch.testing.assert_close(part, whole[start : start + 1], rtol=1e-6, atol=0)


def linear_layers(lab):
    infos = lab.open("base").tensors.values()
    return {info.name: info.shape for info in infos if "_proj" in info.name}


def in_memory(lab, tuned, mask, fusion, strength=1.0, aligned="base"):
    """Name → value, as realignment computes it."""
    problem = Problem([task_vector(lab.open(name), lab.open(aligned)) for name in tuned], fusion)
    realigned = mask_family(problem, mask, (strength,)).at(strength)
    return {name: realigned(name) for name in problem.names}


def fused(lab, tmp_path, tuned, mask, weights=None, **settings):
    files = []
    for number, each in enumerate(mask if isinstance(mask, list) else [mask]):
        each.save(tmp_path / f"mask{number}")
        files.append(str(tmp_path / f"mask{number}"))
    given = tuple(Input(str(lab.root / name), name, w) for name, w in zip(tuned, weights or [1.0] * len(tuned)))  # noqa: B905
    chosen = {"file": files if isinstance(mask, list) else files[0], **settings}
    request = Request(str(lab.root / "base"), given, tmp_path / "out", "mask", chosen, max_shard_size=30_000)
    plan = build_plan(request, lab.root / "cache")
    assert execute(plan, threads=2).committed
    found = open_checkpoint(tmp_path / "out")
    return {name: found.read(name) for name in found.tensors}, plan


@pytest.mark.parametrize("granularity", ["entry", "row", "column", "tensor"])
@pytest.mark.parametrize("binary", [True, False])
def test_full_models_to_the_bit(lab, tmp_path, monkeypatch, granularity, binary):
    monkeypatch.setattr(spans, "PIECE", 70)  # a few rows a piece
    monkeypatch.setattr(spans, "_TASK", 500)
    mask = random_mask(linear_layers(lab), granularity, binary)
    found, plan = fused(lab, tmp_path, ["full_all", "full"], mask, weight=0.5)
    wanted = in_memory(lab, ["full_all", "full"], mask, Fusion("task_arithmetic", {"weight": 0.5}))
    base = lab.open("base")
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
        assert name in mask.values or torch.equal(found[name], base.read(name))  # full_all changes these as well
    assert sum(tensor.fused for unit in plan.units for tensor in unit.tensors) == len(mask.values)
    assert any("that no mask covers stay the base's" in note for note in plan.notes)


def test_a_rescaled_mask_and_a_strength(lab, tmp_path):
    mask = random_mask(linear_layers(lab), rescale="mean")
    found, _ = fused(lab, tmp_path, ["full"], mask)
    for name, value in in_memory(lab, ["full"], mask, Fusion("task_arithmetic")).items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    plain = replace(mask, settings=MaskSettings())
    found, _ = fused(lab, tmp_path, ["full"], mask, rescale="none", strength=1.2)
    for name, value in in_memory(lab, ["full"], plain, Fusion("task_arithmetic"), 1.2).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    with pytest.raises(InputError, match="has no strength"):
        fused(lab, tmp_path, ["full"], mask, strength=1.2)


def test_a_mask_that_keeps_norms(lab, tmp_path, monkeypatch):
    """Over weights tensors are taken whole; over factors, these are; parts of other masks stay parts."""
    monkeypatch.setattr(spans, "PIECE", 70)
    monkeypatch.setattr(spans, "_TASK", 500)
    mask = random_mask(linear_layers(lab), "row", rescale="norm")
    found, plan = fused(lab, tmp_path, ["full", "full2"], mask)
    assert plan.fusion.part == "tensor" and not plan.fusion.linear
    for name, value in in_memory(lab, ["full", "full2"], mask, Fusion("task_arithmetic")).items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    with pytest.raises(InputError, match="has no strength"):
        fused(lab, tmp_path, ["full"], mask, strength=1.2)


def test_a_mask_over_factors_that_keeps_norms(lab, tmp_path):
    mask = random_mask({info.name: info.shape for info in lab.open("fresh").tensors.values()}, rescale="norm")
    found, plan = fused(lab, tmp_path, ["fresh"], mask)
    assert plan.fusion.part == "row"
    realign(lab.root / "base", [lab.root / "fresh"], out=tmp_path / "adapter", mask=tmp_path / "mask0")
    merged = load_model(open_checkpoint(tmp_path / "adapter")).state_dict()
    for name, value in found.items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)


def test_a_mask_of_its_own_for_each_model(lab, tmp_path):
    masks = [random_mask(linear_layers(lab), granularity) for granularity in ("entry", "row")]
    found, _ = fused(lab, tmp_path, ["full", "full2"], masks, weights=[0.7, 0.4])
    base = lab.open("base")
    for name in linear_layers(lab):
        start = base.read(name)
        taus = [lab.open(tuned).read(name) - start for tuned in ("full", "full2")]
        wanted = start + 0.7 * masks[0].weight(name) * taus[0] + 0.4 * masks[1].weight(name) * taus[1]
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("granularity", ["entry", "row", "column", "tensor", "rank"])
def test_the_factors_of_an_adapter(lab, tmp_path, granularity):
    """The masked factors, written as an adapter by realignment and merged by PEFT, are what the engine writes."""
    shapes = {info.name: info.shape for info in lab.open("fresh").tensors.values()}
    mask = random_mask(shapes, granularity)
    found, _ = fused(lab, tmp_path, ["fresh"], mask)
    realign(lab.root / "base", [lab.root / "fresh"], out=tmp_path / "adapter", strength=1.0,
                   settings={"mask": str(tmp_path / "mask0")})  # fmt: skip
    merged = load_model(open_checkpoint(tmp_path / "adapter")).state_dict()
    changed = 0
    for name, value in found.items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(value, lab.open("base").read(name))
    assert changed == len(shapes) // 2


def test_an_adapter_in_the_weights(lab, tmp_path):
    names = {n: s for n, s in linear_layers(lab).items() if "q_proj" in n or "down_proj" in n}
    mask = random_mask(names)
    found, _ = fused(lab, tmp_path, ["fresh"], mask)
    vector = task_vector(lab.open("fresh"), lab.open("base"), "weights")
    wanted = mask_family(Problem([vector]), mask, (1.0,)).at(1.0)
    for name in names:
        torch.testing.assert_close(found[name], wanted(name), rtol=1e-6, atol=1e-7)


def problems(lab, tmp_path, tuned, mask, **settings):
    with pytest.raises(InputError) as caught:
        fused(lab, tmp_path, tuned, mask, **settings)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_what_does_not_fit_is_found_at_the_plan(lab, tmp_path):
    layers = linear_layers(lab)
    first = next(iter(layers))
    other = {**layers, first: (3, 5), "model.layers.7.mlp.up_proj.weight": (4, 4)}
    text = problems(lab, tmp_path, ["full", "full2"], random_mask(other))
    assert text.count(f"entry values for {first} have shape (3, 5)") == 1  # a shared mask: once, not once a model
    assert "model.layers.7.mlp.up_proj.weight, which is not there" in text
    factors = {info.name: info.shape for info in lab.open("fresh").tensors.values()}
    text = problems(lab, tmp_path, ["fresh", "full"], random_mask(factors))
    assert "full is a full model" in text and "fresh is" not in text
    half = dict(list(factors.items())[1:])
    assert f"no values for {next(iter(factors))}" in problems(lab, tmp_path, ["fresh"], random_mask(half))
    three = [random_mask(layers)] * 3
    assert "3 masks for 2 models" in problems(lab, tmp_path, ["full", "full2"], three)
    with pytest.raises(InputError, match="no such file"):
        build_plan(Request(str(lab.root / "base"), (Input(str(lab.root / "full")),), tmp_path / "o", "mask",
                           {"file": str(tmp_path / "nowhere")}))  # fmt: skip
    with pytest.raises(InputError, match="needs the setting 'file'"):
        Fusion("mask").resolved()


def test_a_mask_of_another_base_is_refused(lab, tmp_path):
    mine, other = lab.open("base").digest, lab.open("full").digest  # now remembered: the plan can tell without reading
    fused(lab, tmp_path, ["full"], random_mask(linear_layers(lab), aligned=mine))
    (tmp_path / "out").rename(tmp_path / "done")
    mask = random_mask(linear_layers(lab), aligned=other)
    assert "made for another base" in problems(lab, tmp_path, ["full"], mask)
    fused(lab, tmp_path, ["full"], mask, check=False)


def test_a_mask_of_another_base_is_found_while_hashing_where_nothing_is_remembered(lab, tmp_path):
    random_mask(linear_layers(lab), aligned="f" * 64).save(tmp_path / "mask")
    request = Request(str(lab.root / "base"), (Input(str(lab.root / "full")),), tmp_path / "out", "mask",
                      {"file": str(tmp_path / "mask")})  # fmt: skip
    plan = build_plan(request, tmp_path / "empty")
    with pytest.raises(InputError, match="not the base that the method's file was made for"):
        execute(plan, threads=1)
    assert not (tmp_path / "out").exists()


def test_another_mask_is_another_plan(lab, tmp_path):
    _, first = fused(lab, tmp_path, ["full"], random_mask(linear_layers(lab)))
    found, second = fused(lab, tmp_path, ["full"], random_mask(linear_layers(lab), binary=True))
    assert first.digest != second.digest
    receipts = json.loads((tmp_path / "out" / "resafe-receipts.json").read_text())
    assert receipts["settings"]["file"] == str(tmp_path / "mask0") and receipts["plan"] == second.digest
    assert found
