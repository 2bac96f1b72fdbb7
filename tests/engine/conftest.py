"""Small checkpoints of any names, shapes, dtypes and shardings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from resafe.engine import Input, Request

SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.experts.up": (3, 24, 16),
    "model.layers.0.norm.weight": (16,),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.mlp.experts.up": (3, 24, 16),
    "model.layers.1.norm.weight": (16,),
    "model.steps": (),
}


def tensors(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random tensors of `SHAPES`; `model.steps` is an integer."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in SHAPES.items()}
    found["model.steps"] = torch.tensor(7)
    return found


def write(
    path: Path, values: Mapping[str, torch.Tensor], shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """A model directory with the tensors spread over `shards` files."""
    path.mkdir(parents=True)
    names = list(values)
    if shards == 1:
        save_file(dict(values), path / "model.safetensors", metadata={"format": "pt"})
    else:
        placed = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in set(placed.values()):
            save_file({n: values[n] for n in names if placed[n] == file}, path / file, metadata={"format": "pt"})
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    (path / "tokenizer_config.json").write_text("{}")
    return path


class Farm:
    """A base and two tuned models in one directory, and requests on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        base = tensors(0)
        self.values = [base]
        write(root / "base", base, shards=3)
        for k in (1, 2):
            change = tensors(k, 0.1, torch.float32)
            tuned = {n: (v.float() + change[n]).to(v.dtype) if v.is_floating_point() else v for n, v in base.items()}
            write(root / f"tuned{k}", tuned, shards=k)
            self.values.append(tuned)

    def request(self, out: str = "out", **changes: Any) -> Request:
        """A fusion of the two models by names a and b."""
        models = (Input(str(self.root / "tuned1"), "a"), Input(str(self.root / "tuned2"), "b"))
        return Request(**{"base": str(self.root / "base"), "models": models, "out": self.root / out, **changes})


@pytest.fixture
def farm(tmp_path: Path) -> Farm:
    """The farm, anew for each test."""
    return Farm(tmp_path)
