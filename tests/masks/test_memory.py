"""Training in less memory: logits in bfloat16, and steps in the backward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resafe.errors import InputError
from resafe.masks.engine import EngineSettings, checkpoint_layers
from resafe.masks.fused import Kernels
from resafe.masks.modules import MaskedModule
from resafe.masks.processes import Processes
from tests.masks.test_modules import masked
from tests.masks.test_train import ITEMS, SHORT, trainer


def logits_of(made):
    return {key: value.detach().float().clone() for key, value in made.logits.values.items()}


@pytest.mark.parametrize("loss", ["sft", "sigmoid"])
def test_steps_in_the_backward_pass_are_those_after_it(lab, loss):
    settings = replace(SHORT, loss=loss, removal_price=0.1)
    plain, early = trainer(lab, settings), trainer(lab, settings, engine=EngineSettings(step_in_backward=True))
    plain.run(), early.run()
    assert all(value.grad is None for value in early.logits.parameters())
    for key, value in logits_of(plain).items():
        torch.testing.assert_close(early.logits.values[key].detach(), value, rtol=0, atol=1e-6)
    early.loss(early.batches.at(0))[0].backward()  # scores and the like take gradients, and move nothing
    assert all(value.grad is not None for value in early.logits.parameters())
    assert plain.identity() != early.identity()


def assert_resumes(straight, lab, engine, work):
    """A training that goes on from its checkpoint at step 3 ends as the one that was not stopped, bit by bit."""
    trainer(lab, engine=engine, work=work, checkpoint_every=3).run()
    again = trainer(lab, engine=engine, work=work)
    assert again.resume() == 3
    again.run()
    for key, value in logits_of(straight).items():
        assert torch.equal(again.logits.values[key].detach(), value)


def test_steps_in_the_backward_pass_resume(lab, tmp_path):
    engine = EngineSettings(step_in_backward=True)
    straight = trainer(lab, engine=engine)
    straight.run()
    assert_resumes(straight, lab, engine, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True])
def test_many_logits_are_stepped_in_one_pass_to_the_same_end(lab, tmp_path, monkeypatch, early):
    engine = EngineSettings(step_in_backward=early)
    plain = trainer(lab, engine=engine)
    monkeypatch.setattr("resafe.masks.engine.MANY", 1)
    many = trainer(lab, engine=engine)
    assert many.optimizer.param_groups[0]["fused"] and not plain.optimizer.param_groups[0]["fused"]
    plain.run(), many.run()
    for key, value in logits_of(plain).items():
        torch.testing.assert_close(many.logits.values[key].detach(), value, rtol=0, atol=1e-5)
    assert_resumes(many, lab, engine, tmp_path)


TOKENS = torch.tensor([[1, 2, 3, 9]])


def bytes_kept(model, values):
    """Bytes a masked entry that the backward pass keeps beside the model, and the gradients."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (tensor, 0 if storage.data_ptr() in own else storage.nbytes())
        return tensor

    model(input_ids=TOKENS)  # the first pass tries out compiling
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=TOKENS).logits.square().sum()
    loss.backward()
    entries = sum(value.numel() for value in values.values.values())
    return sum(size for _, size in kept.values()) / entries, {key: v.grad for key, v in values.values.items()}


DRAWS = [
    {"sampling": "relaxed"},
    {"sampling": "straight_through"},
    {"sampling": "relaxed", "rescale": "mean"},
    {"sampling": "deterministic"},
]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask", DRAWS)
def test_draws_are_made_again_where_that_is_cheap(lab, mask, compiled):
    """Kept are the layers' inputs (0.7 bytes an entry of this model), not masks or weights (4 bytes each)."""
    found = {}
    for again in (None, True, False):
        torch._dynamo.reset()
        model, values, _ = masked(lab, ("full_all",), "base", **mask)
        values.kernels = Kernels("on", "aot_eager_decomp_partition") if compiled else Kernels()
        values.step = 3
        for layer in model.modules():
            if isinstance(layer, MaskedModule):
                layer.again = again
        found[again] = bytes_kept(model, values)
    assert found[True][0] < 1 and found[False][0] > 4
    drawn_on_a_cpu = mask["sampling"] != "deterministic" and not compiled
    assert found[None][0] == found[not drawn_on_a_cpu][0]
    for key, gradient in found[False][1].items():
        assert torch.equal(found[True][1][key], gradient) and float(gradient.abs().sum()) > 0


def test_draws_are_made_again_where_memory_is_to_be_saved(lab):
    found = []
    for again in (False, True):
        model, values, _ = masked(lab, ("full_all",), "base", sampling="relaxed")
        if again:
            checkpoint_layers(model)
        found.append(bytes_kept(model, values))
    assert found[0][0] > 8 and found[1][0] < 0.5
    assert all(torch.equal(found[1][1][key], gradient) for key, gradient in found[0][1].items())


def in_bfloat16(lab, optimizer="adamw", work=None, **more):
    from resafe.masks import MaskTrainer

    model, values, _ = masked(lab)
    values.to(torch.bfloat16)
    engine = EngineSettings(logits="bfloat16", optimizer=optimizer)
    return MaskTrainer(model, values, ITEMS, SHORT, pad_id=1, engine=engine, work=work, **more)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_logits_in_bfloat16_follow_those_in_float32(lab, tmp_path, optimizer):
    pytest.importorskip("torchao")
    plain, small = trainer(lab), in_bfloat16(lab, optimizer)
    plain.run(), small.run()
    found = torch.cat([value.flatten() for value in logits_of(small).values()])
    wanted = torch.cat([value.flatten() for value in logits_of(plain).values()])
    assert {value.dtype for value in small.logits.parameters()} == {torch.bfloat16}
    assert float((found - wanted).abs().mean()) < 0.05 * float(wanted.abs().mean())
    in_bfloat16(lab, optimizer, tmp_path, checkpoint_every=3).run()
    again = in_bfloat16(lab, optimizer, tmp_path)
    assert again.resume() == 3
    again.run()
    assert torch.equal(torch.cat([value.flatten() for value in logits_of(again).values()]), found)


def test_what_cannot_be(lab):
    with pytest.raises(InputError, match="before their norm is known"):
        trainer(lab, replace(SHORT, max_norm=1.0), engine=EngineSettings(step_in_backward=True))
    for engine in (EngineSettings(step_in_backward=True), EngineSettings(logits="bfloat16")):
        with pytest.raises(InputError, match="are for one process"):
            trainer(lab, engine=engine, processes=Processes(0, 2))
