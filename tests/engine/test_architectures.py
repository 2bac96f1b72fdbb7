"""Architectures as transformers saves them (experts, images beside text, state spaces) and GGUF, through a fusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MixtralConfig,
)

import resafe
from resafe.checkpoints import open_checkpoint
from tests.checkpoints.test_gguf import write_gguf

TEXT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = CLIPVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
    projection_dim=16,
)  # fmt: skip
CASES = {
    "experts": (AutoModelForCausalLM, MixtralConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2)),
    "state space": (
        AutoModelForCausalLM,
        MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2),
    ),
    "images": (
        AutoModelForImageTextToText,
        LlavaConfig(vision_config=VISION, text_config=LlamaConfig(**TEXT), image_token_index=39),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_any_architecture_goes_by_its_names(case: str, tmp_path: Path) -> None:
    loader, config = CASES[case]
    torch.manual_seed(0)
    states = []
    for name in ("base", "one", "two"):
        model = loader.from_config(config)
        model.save_pretrained(tmp_path / name)
        states.append(model.state_dict())
    resafe.fuse(tmp_path / "base", [tmp_path / "one", tmp_path / "two"], method="average", out=tmp_path / "out")
    found = loader.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == states[0].keys()
    for name, value in found.items():
        mean = (states[1][name] + states[2][name]) / 2 if value.is_floating_point() else states[0][name]
        torch.testing.assert_close(value, mean, rtol=1e-6, atol=1e-7)


def test_gguf_is_a_base_and_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("RESAFE_CACHE", str(tmp_path / "cache"))
    model = write_gguf(tmp_path / "base.gguf")
    base = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    resafe.fuse(
        tmp_path / "base.gguf", [tmp_path / "tuned", tmp_path / "base.gguf"], method="task_arithmetic",
        settings={"weight": 0.5}, out=tmp_path / "out",
    )  # fmt: skip
    found = open_checkpoint(tmp_path / "out")
    for name in found.tensors:
        torch.testing.assert_close(found.read(name), base[name] + 0.5)
    assert "quantization_config" not in found.config
