"""Fused models against mergekit 0.1.5 on the same tiny models, tensor by tensor.

Intended differences, which the inputs here avoid or which are asked for: the count of kept entries (mergekit truncates
density · n, resafe rounds it: shares and sizes here give whole numbers), DARE's and DELLA's draws (their own generators:
their statistics are tested elsewhere), TIES over the whole model (mergekit has none: `scope: tensor`), sums in float32.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import resafe
from resafe.checkpoints import open_checkpoint

from .mergekit.make_golden import GOLDEN
from .mergekit.models import CASES, COMPARED, make_models


@pytest.mark.parametrize("case", CASES)
def test_equals_mergekit(case, tmp_path):
    golden, asked = load_file(GOLDEN), CASES[case]
    base, *tuned = make_models(tmp_path)
    chosen = tuned[: asked.get("models", 3)]
    models = [base, *chosen] if case == "slerp" else chosen  # mergekit's SLERP goes from the base to the one model
    method, settings = asked["ours"]
    resafe.fuse(
        base, models, out=tmp_path / "out", method=method, settings=settings, weights=asked.get("weights"), threads=1
    )
    found, before = open_checkpoint(tmp_path / "out"), open_checkpoint(base)
    for name in COMPARED:
        wanted = golden[f"{case}/{name}"]
        torch.testing.assert_close(found.read(name), wanted, rtol=1e-4, atol=2e-6, msg=lambda m: f"{case} {name}: {m}")  # noqa: B023
        assert not torch.allclose(wanted, before.read(name), atol=1e-3)
