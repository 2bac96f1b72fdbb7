"""Adapters as inputs and as outputs, against PEFT's own merge of the same adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import resafe
from resafe.checkpoints import load_model, open_checkpoint
from resafe.engine.lowrank import truncated_product
from resafe.errors import InputError
from tests.tiny import TOKENS, logits


def weights(reference: Path) -> dict[str, torch.Tensor]:
    return load_model(open_checkpoint(reference)).state_dict()


def make(lab, out: Path, **options):
    """An adapter on the lab's base, with the given LoRA options and weights that do something."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options})
    torch.manual_seed(sum(map(ord, out.name)))
    model = get_peft_model(lab.plain(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = str(lab.root / "base")
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 8, "use_dora": True},
        {"lora_alpha": 8, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"lora_alpha": 8, "modules_to_save": ["norm"]},
        {"lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["lora", "rslora", "dora", "patterns", "modules_to_save", "head"],
)
def test_one_adapter_is_what_peft_merges(lab, tmp_path, options):
    adapter = make(lab, tmp_path / "adapter", **options)
    outcome = resafe.fuse(lab.root / "base", [adapter], out=tmp_path / "out", threads=1)
    assert outcome.committed
    found, wanted, base = weights(tmp_path / "out"), weights(adapter), weights(lab.root / "base")
    assert any(not torch.equal(wanted[name], base[name]) for name in base)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_an_adapter_and_a_full_model_together(lab, tmp_path):
    resafe.fuse(lab.root / "base", [lab.root / "fresh", lab.root / "full"], out=tmp_path / "out", weights=[0.5, 0.25])
    base, fresh, full = (weights(lab.root / name) for name in ("base", "fresh", "full"))
    for name, value in weights(tmp_path / "out").items():
        wanted = base[name] + 0.5 * (fresh[name] - base[name]) + 0.25 * (full[name] - base[name])
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "average"])
def test_the_sum_of_adapters_is_an_adapter(lab, tmp_path, method):
    first = make(lab, tmp_path / "a", lora_alpha=8)
    second = make(lab, tmp_path / "b", lora_alpha=6, target_modules=["q_proj", "v_proj"], r=3)
    common = {"method": method, "weights": [0.7, 0.6]}
    resafe.fuse(lab.root / "base", [first, second], out=tmp_path / "low", output="adapter", **common)
    resafe.fuse(lab.root / "base", [first, second], out=tmp_path / "full", threads=1, **common)
    low, full = load_model(open_checkpoint(tmp_path / "low")), load_model(open_checkpoint(tmp_path / "full"))
    torch.testing.assert_close(logits(low), logits(full), rtol=1e-4, atol=1e-5)
    config = open_checkpoint(tmp_path / "low").config
    assert config["r"] == 7 and config["lora_alpha"] == 7
    assert TOKENS.shape == (2, 8)


def test_truncation_is_the_best_of_its_rank(lab, tmp_path):
    torch.manual_seed(0)
    up, down = torch.randn(20, 6), torch.randn(6, 9)
    b, a, left, whole = truncated_product(up, down, 3)
    u, s, v = torch.linalg.svd(up @ down, full_matrices=False)
    torch.testing.assert_close(b @ a, (u[:, :3] * s[:3]) @ v[:3], rtol=1e-4, atol=1e-4)
    assert left == pytest.approx(float((s[3:] ** 2).sum()), rel=1e-4)
    assert whole == pytest.approx(float((s**2).sum()), rel=1e-4)
    notes: list[str] = []
    from resafe.api import run_fusion
    from resafe.engine import Input, Request

    first, second = make(lab, tmp_path / "a", lora_alpha=8), make(lab, tmp_path / "b", lora_alpha=8)
    models = (Input(str(first), "a"), Input(str(second), "b"))
    request = Request(str(lab.root / "base"), models, tmp_path / "low", output="adapter", rank=5)
    run_fusion(request, note=notes.append)
    assert open_checkpoint(tmp_path / "low").config["r"] == 5
    assert notes[-1].startswith("rank 5, relative error 0.")


def test_what_is_no_low_rank_is_refused(lab, tmp_path):
    adapter = make(lab, tmp_path / "a", lora_alpha=8)
    dora = make(lab, tmp_path / "d", lora_alpha=8, use_dora=True)
    for models, method, message in (
        ([adapter], "ties", "has no low rank"), ([lab.root / "full"], "average", "is a full model"),
        ([dora], "average", "no plain LoRA factor|is not a plain"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            resafe.fuse(lab.root / "base", models, out=tmp_path / "x", method=method, output="adapter")
    with pytest.raises(InputError, match="sits on"):
        resafe.fuse(lab.root / "full", [adapter], out=tmp_path / "x")
    with pytest.raises(InputError, match="2 weights for 1"):
        resafe.fuse(lab.root / "base", [adapter], out=tmp_path / "x", weights=[1, 2])
