"""A laboratory of tiny checkpoints for task vectors, masks and realignment: adapters and full models of one base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resafe.checkpoints import Checkpoint, open_checkpoint
from resafe.data.items import Example, Pair
from tests.evals.tiny import tiny_model, tiny_tokenizer

TOKENS = torch.tensor([[5, 20, 31, 3, 6, 44, 58, 71], [5, 8, 9, 3, 6, 90, 12, 33]])
REFUSALS = [" ".join(f"w{n + 20 + k}" for k in range(1 + n % 3)) for n in range(6)]  # of ragged lengths
PAIRS = [
    *(Pair(f"s{n}", f"w{n} w{n + 7} w{n + 9}", refusal, f"w{n + 40} w{n + 41}") for n, refusal in enumerate(REFUSALS)),
    *(Pair(f"h{n}", f"w{n + 50}", f"w{n + 60} w{n + 61}", f"w{n + 70}", "harmless") for n in range(4)),
]
KEEP = [Example(f"t{n}", f"w{n + 3} w{n + 30}", f"w{n + 80} w{n}") for n in range(3)]


@dataclass(frozen=True)
class Lab:
    """Directories: base, safe (adapter), tuned and tuned2 (continue safe), fresh (adapter on base), full, full2 (other
    linear layers), full_all (all other); tied and tied_full have the embedding as their head; dora (an adapter on base,
    with a norm trained whole)."""

    root: Path

    def open(self, name: str) -> Checkpoint:
        return open_checkpoint(self.root / name, cache=self.root / "cache")

    def plain(self, name: str = "base") -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.root / name).eval()

    def adapted(self, path: str | Path) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(self.plain(), self.root / path).eval()


@dataclass
class Source:
    """A `ModelSource` over one of the laboratory's models."""

    lab: Lab
    name: str = "base"
    system: str | None = None
    device: str = "cpu"

    @property
    def tokenizer(self) -> Any:
        return tiny_tokenizer()

    def plain(self, device: str | None = None) -> Any:
        return self.lab.plain(self.name).to(device or self.device)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def build(root: Path) -> Lab:
    from peft import LoraConfig, get_peft_model

    lab = Lab(root)
    tiny_model(initializer_range=0.2).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(1)
    for name in ("safe", "fresh"):
        model = get_peft_model(lab.plain(), config)
        _disturb(model, "lora_", 0.1)
        model.save_pretrained(root / name)
    for name in ("tuned", "tuned2"):
        model = lab.adapted("safe")
        _disturb(model, "lora_", 0.1)
        model.save_pretrained(root / name)
    for name, part in (("full", "_proj"), ("full2", "_proj"), ("full_all", ""), ("tied", ""), ("tied_full", "")):
        model = tiny_model(initializer_range=0.2, tie_word_embeddings=True) if name == "tied" else None
        model = model or lab.plain("tied" if name == "tied_full" else "base")
        _disturb(model, part, 0.05)
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    model = get_peft_model(lab.plain(), replace(config, use_dora=True, modules_to_save=["norm"]))
    _disturb(model, "lora_", 0.1)
    _disturb(model, "modules_to_save", 0.1)
    model.save_pretrained(root / "dora")
    return lab


def saved_pair(model: Any, path: Path, *, base: float, tuned: float) -> tuple[Checkpoint, Checkpoint]:
    """A model with all its parameters moved by noise of one size, and from there by noise of another; both saved."""
    for name, size in (("base", base), ("tuned", tuned)):
        _disturb(model, "", size)
        model.save_pretrained(path / name)
    first, second = (open_checkpoint(path / name, cache=path / "cache") for name in ("base", "tuned"))
    return first, second


def _disturb(model: Any, part: str, size: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(size * torch.randn_like(parameter))
