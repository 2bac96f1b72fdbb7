"""Masked weights formed in one compiled pass, against the step-by-step path: values and gradients."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from resafe.fusion import Fusion
from resafe.masks import MaskSettings
from resafe.masks.concrete import norm_kept
from resafe.masks.engine import EngineSettings
from resafe.masks.fused import Kernels
from resafe.tensors import uniform
from tests.masks.test_modules import masked
from tests.masks.test_train import SHORT, trainer

TOKENS = torch.tensor([[1, 2, 3, 9]])
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
INDUCTOR = pytest.param(
    "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not COMPILER, reason="no C++ compiler for inductor")]
)


@pytest.fixture(autouse=True)
def fresh():
    """Compiled code is forgotten: what is compiled too often for one function runs eagerly, and would prove nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize(
    ("sampling", "rescale", "shape"),
    [
        ("deterministic", "none", (6, 10)),
        ("relaxed", "mean", (6, 10)),
        ("straight_through", "none", (6, 1)),
        ("relaxed", "norm", (1, 10)),
        ("direct", "mean", (6, 1)),
    ],
)
def test_functions_by_hand(backend, sampling, rescale, shape):
    torch.manual_seed(0)
    settings = MaskSettings(sampling=sampling, rescale=rescale, temperature=0.4)
    kernels = Kernels("on", counting(backend))
    delta, weight, back = torch.randn(3, 6, 10)
    noise = uniform(shape, 0, "test") if sampling in ("relaxed", "straight_through") else None
    found, wanted = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    if sampling == "direct":
        mask = wanted
    elif noise is None:
        mask = 1 / (1 + (-wanted).exp())
    else:
        mask = 1 / (1 + (-(wanted + noise.log() - (1 - noise).log()) / 0.4).exp())
        mask = mask + ((mask > 0.5).float() - mask).detach() if sampling == "straight_through" else mask
    mask = mask / mask.mean() if rescale == "mean" else mask
    product = norm_kept(mask * delta, delta) if rescale == "norm" else mask * delta
    if rescale == "norm":
        values = [kernels.delta(found, noise, delta, settings), product]
    else:
        values = [kernels.weight(found, noise, delta, weight, settings), weight + product]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad((value * back).sum(), of)[0] for value, of in zip(values, (found, wanted), strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert kernels.backend.frame_count >= 1


MODELS = {
    "adapter": (("tuned",), "safe", {"sampling": "relaxed", "rescale": "mean"}, "average"),
    "ranks": (("tuned",), "safe", {"granularity": "rank"}, "average"),
    "heads": (("tuned",), "safe", {"granularity": "head", "head_size": 8}, "average"),
    "weights": (("full",), "base", {"initial": 0.5}, "average"),
    "masks of their own": (("tuned", "tuned2"), "safe", {"per_task": True}, "average"),
    "ties": (("tuned", "tuned2"), "safe", {"rescale": "norm"}, "ties"),
}


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("case", MODELS)
def test_models(lab, backend, case):
    tuned, aligned, settings, fusion = MODELS[case]
    ends = []
    for kernels in (Kernels(), Kernels("on", counting(backend))):
        model, values, _ = masked(lab, tuned, aligned, fusion=Fusion(fusion), **settings)
        torch.manual_seed(0)
        for key in sorted(values.values):
            values.values[key].data = torch.randn(values.values[key].shape)
        values.kernels = kernels
        values.refresh()
        scores = model(input_ids=TOKENS).logits
        scores.square().mean().backward()
        with values.reading("random"), torch.no_grad():
            drawn = model(input_ids=TOKENS).logits
        with values.reading("ones"), torch.no_grad():
            ones = model(input_ids=TOKENS).logits
        ends.append((scores.detach(), drawn, ones, {key: value.grad for key, value in values.values.items()}))
    for found, wanted in zip(ends[1][:3], ends[0][:3], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for key, gradient in ends[0][3].items():
        torch.testing.assert_close(ends[1][3][key], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1))
        assert float(gradient.abs().sum()) > 0
    assert kernels.backend.frame_count >= 1


def test_where_it_is_used():
    places = [torch.device(name) for name in ("cpu", "cuda")]
    used = {when: [Kernels(when).used_on(place) for place in places] for when in ("auto", "on", "off")}
    assert used == {"auto": [False, True], "on": [True, True], "off": [False, False]}


def test_without_a_compiler_masks_are_formed_eagerly(lab):
    def missing(graph, inputs):
        raise RuntimeError("no compiler here")

    model, values, _ = masked(lab)
    wanted = model(input_ids=TOKENS).logits
    values.kernels = Kernels("on", missing)
    with pytest.warns(UserWarning, match="without torch.compile"):
        found = model(input_ids=TOKENS).logits
    assert not values.kernels.used_on(torch.device("cpu"))
    torch.testing.assert_close(found, wanted)


def test_training_is_another_one_only_where_it_is_compiled(lab, monkeypatch):
    monkeypatch.setattr("resafe.masks.train.Kernels", lambda when: Kernels(when, "aot_eager"))
    plain, auto, fused = (trainer(lab, engine=EngineSettings(fused=when)) for when in ("off", "auto", "on"))
    assert plain.identity() == auto.identity() != fused.identity()
    settings = replace(SHORT, steps=3)
    ends = []
    for when in ("auto", "on"):
        made = trainer(lab, settings, engine=EngineSettings(fused=when))
        made.run()
        ends.append(torch.cat([value.detach().flatten() for value in made.logits.values.values()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)
