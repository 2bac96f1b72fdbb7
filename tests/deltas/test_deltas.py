"""Task vectors against tensors read by safetensors and models merged by PEFT."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from resafe.checkpoints import open_checkpoint
from resafe.deltas import DifferenceVector, LoraProductVector, check_together, task_vector
from resafe.deltas.lora import factor_modules, scaling
from resafe.errors import InputError


def stored(lab, name):
    file = "model.safetensors" if name.startswith(("base", "full")) else "adapter_model.safetensors"
    return load_file(lab.root / name / file)


@pytest.mark.parametrize(("tuned", "aligned"), [("tuned", "safe"), ("full_all", "base"), ("fresh", "base")])
def test_differences_by_name(lab, tuned, aligned):
    vector = task_vector(lab.open(tuned), lab.open(aligned))
    new = stored(lab, tuned)
    old = stored(lab, aligned) if tuned != "fresh" else {name: torch.zeros_like(t) for name, t in new.items()}
    assert isinstance(vector, DifferenceVector)
    assert vector.names == tuple(sorted(new))
    for name in vector.names:
        assert vector.shape(name) == tuple(new[name].shape)
        assert torch.equal(vector.aligned(name), old[name])
        assert torch.equal(vector.delta(name), new[name] - old[name])


@pytest.mark.parametrize("aligned", ["safe", "base"])
def test_products_are_differences_of_merged_weights(lab, aligned):
    vector = task_vector(lab.open("tuned"), lab.open(aligned), "weights")
    assert isinstance(vector, LoraProductVector)
    new = lab.adapted("tuned").merge_and_unload().state_dict()
    old = (lab.plain() if aligned == "base" else lab.adapted("safe").merge_and_unload()).state_dict()
    assert len(vector.names) == 4  # q_proj and down_proj of two layers
    for name in vector.names:
        assert vector.shape(name) == tuple(new[name].shape)
        torch.testing.assert_close(vector.aligned(name), old[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(vector.delta(name), new[name] - old[name], rtol=1e-4, atol=1e-6)


def changed(lab, tmp_path, name, change_config=None, change=None):
    path = tmp_path / "changed"
    shutil.copytree(lab.root / name, path)
    config = json.loads((path / "adapter_config.json").read_text())
    config.update(change_config or {})
    (path / "adapter_config.json").write_text(json.dumps(config))
    if change:
        tensors = load_file(path / "adapter_model.safetensors")
        save_file(change(tensors), path / "adapter_model.safetensors")
    return open_checkpoint(path, cache=tmp_path / "cache")


def first_only(tensors):
    return {name: tensor for name, tensor in tensors.items() if "layers.0" in name}


def test_products_cover_what_either_adapter_changes(lab, tmp_path):
    part = changed(lab, tmp_path, "tuned", change=first_only)
    vector = task_vector(part, lab.open("safe"), "weights")
    assert len(vector.names) == 4
    safe = lab.adapted("safe").merge_and_unload().state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(vector.delta(name), lab.plain().state_dict()[name] - safe[name], rtol=1e-4, atol=1e-6)
    other = task_vector(lab.open("safe"), part, "weights")
    torch.testing.assert_close(other.delta(name), -vector.delta(name))
    torch.testing.assert_close(other.aligned(name), lab.plain().state_dict()[name])


def test_scaling_as_peft_has_it(lab, tmp_path):
    config = {"use_rslora": True, "alpha_pattern": {"layers.0.mlp.down_proj": 12}, "rank_pattern": {}}
    adapter = changed(lab, tmp_path, "tuned", config)
    assert scaling(lab.open("tuned"), "model.layers.0.mlp.down_proj.weight") == 2
    assert scaling(adapter, "model.layers.0.mlp.down_proj.weight") == 6  # 12 / √4
    assert scaling(adapter, "model.layers.1.mlp.down_proj.weight") == 4
    wrapped = lab.adapted(adapter.path)
    for module, (_, _, scale) in factor_modules(adapter).items():
        assert wrapped.base_model.model.get_submodule(module).scaling["default"] == pytest.approx(scale)


def test_what_does_not_belong_together(lab, tmp_path):
    with pytest.raises(InputError, match="is a full model"):
        task_vector(lab.open("full"), lab.open("safe"))
    with pytest.raises(InputError, match="sits on"):
        task_vector(lab.open("tuned"), lab.open("full"))
    bare = changed(lab, tmp_path, "tuned", {"base_model_name_or_path": None})
    with pytest.raises(InputError, match="base model is not known"):
        task_vector(bare, lab.open("safe"))
    shutil.rmtree(tmp_path / "changed")
    part = changed(lab, tmp_path, "tuned", change=first_only)
    with pytest.raises(InputError, match=r"is only in one of them"):
        task_vector(part, lab.open("safe"))
    shutil.rmtree(tmp_path / "changed")
    with pytest.raises(InputError, match="lora_alpha is 8 in the aligned and 16 in the tuned"):
        task_vector(changed(lab, tmp_path, "tuned", {"lora_alpha": 16}), lab.open("safe"))


def shrunk(tensors):
    return {name: t[:2].clone() if "lora_A" in name else t[:, :2].clone() for name, t in tensors.items()}


def test_several_tuned_models_must_match(lab, tmp_path):
    base = lab.open("base")
    fresh = task_vector(lab.open("fresh"), base)
    check_together([fresh, task_vector(lab.open("tuned"), base)])
    part = task_vector(changed(lab, tmp_path, "tuned", change=first_only), base)
    with pytest.raises(InputError, match="cover different tensors"):
        check_together([fresh, part])
    shutil.rmtree(tmp_path / "changed")
    low = task_vector(changed(lab, tmp_path, "tuned", {"r": 2}, change=shrunk), base)
    with pytest.raises(InputError, match="the tuned models differ in"):
        check_together([fresh, low])
    shutil.rmtree(tmp_path / "changed")
    scaled = task_vector(changed(lab, tmp_path, "tuned", {"lora_alpha": 16}), base)
    with pytest.raises(InputError, match="do not mean the same: they differ in lora_alpha"):
        check_together([fresh, scaled])


def test_only_factors_have_products():
    for tensors, message in (
        (["base_model.model.a.lora_A.weight"], "one of its LoRA factors"),
        (["base_model.model.head.weight"], "is not a LoRA factor"),
    ):
        with pytest.raises(InputError, match=message):
            factor_modules(SimpleNamespace(tensors=tensors, reference="x", config={}))
