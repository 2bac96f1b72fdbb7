"""Methods compute where their task vectors lie, here on a GPU that is faked: a mix of devices raises."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from resafe.fusion import FUSION, Fusion

SETTINGS = {"ties": {"scope": "tensor"}, "slerp": {"t": 0.3}}
MODELS = {"slerp": 2, "nuslerp": 2}


@pytest.mark.parametrize("name", sorted({method.name for method in FUSION} - {"mask"}))
def test_methods_stay_on_the_device(name):
    fusion = Fusion(name, SETTINGS.get(name, {}), models=("a", "b", "c")[: MODELS.get(name, 3)])
    generator = torch.Generator().manual_seed(0)
    real = [torch.randn(8, 16, generator=generator) for _ in fusion.models]
    statistics = fusion.gather(lambda: [real])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = [FakeTensor(mode, torch.empty(8, 16, device="meta"), torch.device("cuda")) for _ in real]
        try:
            fused = fusion.combine("w", faked, statistics, [0.5] * len(faked))
        except DataDependentOutputException:
            pytest.skip("reads a number off a tensor, which a faked one does not hold")
        except RuntimeError as error:
            if "not linked" not in str(error):
                raise
            pytest.skip("calls what a faked GPU cannot do")
        assert fused.device.type == "cuda"
        assert fused.shape == real[0].shape
