"""Training settings by name: the published ones, and ours for current models. Knows settings, no models and no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from resafe.errors import InputError
from resafe.registry import nearest
from resafe.training.settings import LoraSettings


@dataclass(frozen=True)
class Preset:
    """Settings of alignment and tuning for a kind of model.

    Attributes:
        name: Its name.
        title: One line: which models, from where.
        lora: The fresh adapter; None trains all weights.
        sft: Settings of the alignment's SFT.
        dpo: Settings of the alignment's DPO.
        tune: Settings of tuning on a task.
        tasks: What differs from `tune` for some instruction sets, by their names.
    """

    name: str
    title: str
    lora: LoraSettings | None
    sft: Mapping[str, Any]
    dpo: Mapping[str, Any]
    tune: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def tune_for(self, data: str) -> dict[str, Any]:
        """Settings of tuning on one instruction set."""
        return {**self.tune, **self.tasks.get(data, {})}


_PUBLISHED = "published settings, arXiv:2405.09055"


def _published_lora(name: str, model: str) -> Preset:
    """Rank 256 on the query and value projections; 3 epochs each. The paper leaves the LoRA alpha open: 2 · rank."""
    common = {"epochs": 3.0, "batch_size": 16, "max_tokens": 1024, "warmup_steps": 0}
    return Preset(
        name,
        f"{model}, LoRA r 256 on q_proj and v_proj; {_PUBLISHED}",
        LoraSettings(rank=256, targets=("q_proj", "v_proj")),
        sft={**common, "learning_rate": 1e-5},
        dpo={**common, "learning_rate": 1e-5, "beta": 0.1},
        tune={**common, "learning_rate": 5e-5},
    )


def _current(name: str, model: str, rate: float, max_tokens: int = 1024) -> Preset:
    common = {"epochs": 2.0, "batch_size": 16, "max_tokens": max_tokens}
    return Preset(
        name,
        f"{model}, LoRA r 16 on all linear layers; ours, to start from",
        LoraSettings(rank=16),
        sft={**common, "learning_rate": rate},
        dpo={**common, "epochs": 1.0, "learning_rate": rate / 4, "beta": 0.1},
        tune={**common, "learning_rate": rate},
    )


def _full(name: str, model: str, rate: float) -> Preset:
    common = {"epochs": 2.0, "batch_size": 16, "max_tokens": 1024}
    return Preset(
        name,
        f"{model}, all weights; ours, to start from",
        None,
        sft={**common, "learning_rate": rate},
        dpo={**common, "epochs": 1.0, "learning_rate": rate / 20, "beta": 0.1},
        tune={**common, "learning_rate": rate},
    )


def _tinyllama() -> Preset:
    common = {"batch_size": 16, "max_tokens": 1024, "warmup_steps": 0}
    return Preset(
        "tinyllama-full",
        f"TinyLlama-1.1B-Chat, all weights; {_PUBLISHED}",
        None,
        sft={**common, "epochs": 3.0, "learning_rate": 1e-5},
        dpo={**common, "epochs": 3.0, "learning_rate": 2e-7, "beta": 0.1},
        tune={**common, "epochs": 2.0, "learning_rate": 1e-5},
        tasks={
            "alpaca_gpt4_en": {"learning_rate": 1e-6},
            "codealpaca": {"epochs": 5.0},
            "gsm8k": {"epochs": 5.0},
        },
    )


def presets() -> dict[str, Preset]:
    """All presets by name; "default" is what is used if none is named."""
    found = [
        _current("default", "any chat model", 2e-4),
        _published_lora("wizardlm-7b", "WizardLM-7B-Uncensored"),
        _published_lora("llama2-7b-chat", "Llama-2-7b-chat"),
        _tinyllama(),
        _current("llama3", "Llama-3.1 and 3.2 Instruct", 2e-4),
        _current("qwen3", "Qwen3", 2e-4),
        _current("gemma3", "Gemma 3 it", 2e-4),
        _current("smollm2", "SmolLM2-135M and 360M Instruct", 1e-3, 512),
        _full("full", "any chat model", 1e-5),
        _full("smollm2-full", "SmolLM2-135M and 360M Instruct", 5e-5),
    ]
    return {preset.name: preset for preset in found}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: There is none.
    """
    known = presets()
    if name not in known:
        raise InputError(f"there is no preset '{name}'", nearest(name, list(known)))
    return known[name]
