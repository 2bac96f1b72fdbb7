"""Masks over models whose experts transformers merges as it loads them: each stored tensor keeps a mask of its own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from resafe.api import apply_mask
from resafe.checkpoints import load_model, open_checkpoint, parameter_pieces
from resafe.deltas import task_vector
from resafe.errors import InputError
from resafe.masks import Mask, MaskSettings
from resafe.masks.modules import MaskedModule
from resafe.masks.summary import keep_rates, module_of
from resafe.realign import REALIGN, Problem
from resafe.realign.write import write_realigned
from tests.evals.tiny import tiny_tokenizer
from tests.masks.test_names import masked, saved
from tests.tiny import KEEP, PAIRS, TOKENS, Lab, Source, logits

# What the files call an expert's tensors: gate, up and down, with the number of experts.
STORED = {
    "mixtral": ("model.layers.1.block_sparse_moe.experts.{}.{}.weight", ("w1", "w3", "w2"), 4),
    "qwen3_moe": ("model.layers.1.mlp.experts.{}.{}.weight", ("gate_proj", "up_proj", "down_proj"), 12),
}
KINDS = sorted(STORED)


def alike(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def learnable(path, kind):
    aligned, tuned = saved(path, kind)
    tiny_tokenizer().save_pretrained(path / "aligned")
    of = Problem([task_vector(tuned, aligned)], pairs=PAIRS, keep=KEEP, source=Source(Lab(path), "aligned"))
    return aligned, tuned, of


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_masked_by_its_stored_name(tmp_path, kind):
    aligned, tuned = saved(tmp_path, kind)
    vector = task_vector(tuned, aligned)
    model, values = masked(aligned, vector)
    assert set(values.values) == set(vector.names)
    assert STORED[kind][0].format(0, STORED[kind][1][0]) in vector.names
    with values.reading("ones"):
        alike(logits(model), logits(load_model(tuned)))
    with values.reading("zeros"):
        alike(logits(model), logits(load_model(aligned)))
    assert float((logits(load_model(tuned)) - logits(load_model(aligned))).abs().max()) > 0.1


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_task_vector_times_those_of_the_merged_weight(tmp_path, kind, again):
    aligned, tuned = saved(tmp_path, kind)
    vector = task_vector(tuned, aligned)
    model, values = masked(aligned, vector, sampling="direct", initial=1.0)
    for module in model.modules():
        if isinstance(module, MaskedModule):
            module.again = again
    plain = load_model(tuned)
    for side in (model, plain):
        side(input_ids=TOKENS).logits.square().sum().backward()
    name, parts, count = STORED[kind]
    experts = plain.model.layers[1].mlp.experts
    for expert in range(count):
        gate, up = experts.gate_up_proj.grad[expert].chunk(2)
        for part, gradient in zip(parts, (gate, up, experts.down_proj.grad[expert]), strict=True):
            stored = name.format(expert, part)
            wanted = vector.delta(stored) * gradient
            torch.testing.assert_close(values.values[stored].grad, wanted, rtol=1e-3, atol=1e-4)
    assert float(values.values[name.format(0, parts[1])].grad.abs().max()) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_that_was_trained_is_the_one_that_is_applied(tmp_path, kind):
    aligned, tuned, of = learnable(tmp_path, kind)
    learns = {"preset": "labels", "steps": 2, "batch_size": 4, "warm_share": 0.0, "initial": 0.5}
    mask = REALIGN.get("somf").function(of, **learns).mask
    mask.save(tmp_path / "mask")
    apply_mask(tmp_path / "mask", aligned, [tuned], out=tmp_path / "out")
    stored = Mask.load(tmp_path / "mask").values
    model, values = masked(aligned, of.vectors[0], sampling="direct")
    assert set(stored) == set(values.values)
    for key, value in stored.items():
        values.values[key].data = value
    alike(logits(model), logits(load_model(open_checkpoint(tmp_path / "out", cache=tmp_path / "cache"))))
    assert len(stored[STORED[kind][0].format(0, STORED[kind][1][0])].unique()) > 1  # experts have learnt


@pytest.mark.parametrize("kind", KINDS)
def test_the_selector_removes_entries_of_experts(tmp_path, kind):
    _, tuned, of = learnable(tmp_path, kind)
    (vector,) = of.vectors
    found = REALIGN.get("selector").function(of, shares=[0.5])
    write_realigned(tmp_path / "out", of.vectors, found.at(0.5), tuned, "")
    written = load_file(tmp_path / "out" / "model.safetensors")
    name, parts, count = STORED[kind]
    removed = 0
    for stored in (name.format(expert, part) for expert in range(count) for part in parts):
        gone = torch.isclose(written[stored], vector.aligned(stored), atol=1e-7)
        torch.testing.assert_close(written[stored][~gone], tuned.read(stored)[~gone], rtol=0, atol=1e-6)
        removed += int(gone.sum())
    assert removed > 10


@pytest.mark.parametrize("kind", KINDS)
def test_what_tuning_left_alone_has_no_mask(tmp_path, kind):
    """One tensor of a merged parameter, and all of another; of it the model has other values at first."""
    saved(tmp_path, kind)
    name, parts, count = STORED[kind]
    still = {name.format(1, parts[1]), *(name.format(expert, parts[2]) for expert in range(count))}
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("aligned", "tuned"))
    mixed = {key: before[key] if key in still else value for key, value in after.items()}
    save_file(mixed, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    aligned, tuned = (open_checkpoint(tmp_path / side, cache=tmp_path / "cache") for side in ("aligned", "tuned"))
    vector = task_vector(tuned, aligned)
    model = load_model(aligned)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.zero_()
    model, values = masked(aligned, vector, model=model)
    assert set(values.values) == set(vector.names) - still
    with values.reading("ones"):
        alike(logits(model), logits(load_model(tuned)))
    with values.reading("zeros"):
        alike(logits(model), logits(load_model(aligned)))


def test_what_the_model_splits_is_refused_by_name(tmp_path):
    """transformers cuts HRM's two gates out of one tensor."""
    aligned, tuned = saved(tmp_path, "hrm")
    with pytest.raises(InputError, match=r"no parameters of the loaded model:\n  .*") as error:
        masked(aligned, task_vector(tuned, aligned))
    assert "adapter" in error.value.hint


def test_a_parameter_of_which_a_part_is_missing_is_left_out(tmp_path):
    aligned, _ = saved(tmp_path, "mixtral")
    shapes = {name: tensor.shape for name, tensor in aligned.tensors.items()}
    own, name = "model.layers.1.mlp.experts.{}", STORED["mixtral"][0]
    model = load_model(aligned)
    assert len(parameter_pieces(model, shapes)) == len(model.state_dict())
    for missing in ([name.format(3, "w1")], [name.format(n, "w3") for n in range(4)]):
        found = parameter_pieces(model, {key: shape for key, shape in shapes.items() if key not in missing})
        assert own.format("gate_up_proj") not in found and own.format("down_proj") in found


def test_the_experts_of_a_layer_are_shown_as_one_module():
    """Of 128 experts the table would have 384 columns."""
    values = {
        **{f"model.layers.0.mlp.experts.{n}.up_proj.weight": torch.full((2, n + 1), n / 2) for n in range(3)},
        "model.layers.0.mlp.gate.weight": torch.full((3, 2), 0.25),
    }
    mask = Mask.of(values, MaskSettings(), {}, {key: value.numel() for key, value in values.items()})
    found = {(rate.layer, rate.module): rate for rate in keep_rates(mask)}
    assert set(found) == {(0, "mlp.experts.up_proj"), (0, "mlp.gate")}
    experts = found[0, "mlp.experts.up_proj"]
    assert experts.entries == experts.values == 12
    assert experts.keep == pytest.approx((2 * 0 + 4 * 0.5 + 6 * 1) / 12, abs=2e-3)
    assert module_of("task1:model.layers.3.mlp.experts.17.up_proj.weight") == "task1:mlp.experts.up_proj"
