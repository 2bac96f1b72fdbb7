"""The tiny models that both tools fuse, and how each method is asked for. Needs torch and safetensors only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS, VOCABULARY = 16, 24, 2, 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
COMPARED = (
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.input_layernorm.weight",
)

CASES: dict[str, dict[str, Any]] = {
    "linear": {"ours": ("average", {}), "theirs": {"merge_method": "linear"}, "weights": [1.0, 2.0, 0.5]},
    "task_arithmetic": {
        "ours": ("task_arithmetic", {}), "theirs": {"merge_method": "task_arithmetic"}, "weights": [0.5, 0.3, 0.2],
    },
    "ties": {
        "ours": ("ties", {"keep": 0.25, "weight": 1.0, "scope": "tensor"}), "theirs": {"merge_method": "ties"},
        "weights": [1.0, 1.0, 1.0], "density": 0.25,
    },
    "ties_weighted": {
        "ours": ("ties", {"keep": 0.25, "weight": 1.0, "scope": "tensor"}), "theirs": {"merge_method": "ties"},
        "weights": [1.0, 0.5, 2.0], "density": 0.25,
    },
    "breadcrumbs": {
        "ours": ("breadcrumbs", {"keep": 0.75, "top": 0.125}),
        "theirs": {"merge_method": "breadcrumbs", "parameters": {"normalize": False}},
        "weights": [0.5, 0.3, 0.2], "density": 0.75, "gamma": 0.125,
    },
    "breadcrumbs_ties": {
        "ours": ("breadcrumbs_ties", {"keep": 0.75, "top": 0.125}),
        "theirs": {"merge_method": "breadcrumbs_ties", "parameters": {"normalize": False}},
        "weights": [0.5, 0.3, 0.2], "density": 0.75, "gamma": 0.125,
    },
    "model_stock": {"ours": ("model_stock", {}), "theirs": {"merge_method": "model_stock"}},
    "sce": {
        "ours": ("sce", {"keep": 0.25}),
        "theirs": {"merge_method": "sce", "parameters": {"select_topk": 0.25}},
    },
    "slerp": {
        "ours": ("slerp", {"t": 0.3}), "theirs": {"merge_method": "slerp", "parameters": {"t": 0.3}},
        "models": 1,
    },
    "nuslerp": {
        "ours": ("nuslerp", {}), "theirs": {"merge_method": "nuslerp", "parameters": {"nuslerp_flatten": True}},
        "weights": [0.7, 0.3], "models": 2,
    },
    "multislerp": {
        "ours": ("multislerp", {}), "theirs": {"merge_method": "multislerp"}, "weights": [1.0, 2.0, 0.5],
    },
}  # fmt: skip


def make_models(root: Path) -> list[Path]:
    """A base and three tuned models, the same on every machine."""
    paths = [root / name for name in ("base", "tuned0", "tuned1", "tuned2")]
    for number, path in enumerate(paths):
        path.mkdir(parents=True)
        tensors = {}
        for index, (name, shape) in enumerate(_shapes().items()):
            value = _numbers(index, shape)
            if number:  # a change all share, so that angles are below 90°, and one of the model's own
                value = value + 0.1 * _numbers(1000 + index, shape) + 0.1 * _numbers(100 * number + index, shape)
            tensors[name] = value
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(CONFIG))
    return paths


def _shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            found[f"{place}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            found[f"{place}.mlp.{name}_proj.weight"] = (INNER, HIDDEN)
        found[f"{place}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        found[f"{place}.input_layernorm.weight"] = (HIDDEN,)
        found[f"{place}.post_attention_layernorm.weight"] = (HIDDEN,)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def _numbers(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers in (−1, 1) by a formula, so that they do not depend on a library's generator."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(index * 12.9898 + (seed + 1) * 78.233).mul(43758.5453).frac().reshape(shape).to(torch.float32)
