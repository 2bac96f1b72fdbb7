"""LoRA adapters as changes of the weights they sit on: s · B A, formed only when a tensor is read."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from resafe.checkpoints import Checkpoint
from resafe.errors import InputError

_FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


def factor_pairs(adapter: Checkpoint) -> dict[str, tuple[str, str]]:
    """Base weight name → names of its (A, B) factors in the adapter.

    Raises:
        InputError: A tensor is not a LoRA factor, or a factor lacks its partner.
    """
    sides: dict[str, dict[str, str]] = {}
    for name in adapter.tensors:
        match = _FACTOR.match(name)
        if match is None:
            raise InputError(
                f"{adapter.reference}: tensor '{name}' is not a LoRA factor",
                "only LoRA A and B matrices are understood in weight space; use space: factors, or merge the adapter",
            )
        sides.setdefault(match["module"], {})[match["side"]] = name
    for module, found in sides.items():
        if len(found) != 2:
            raise InputError(
                f"{adapter.reference}: '{module}' has only one of its LoRA factors A and B", "save it again"
            )
    return {f"{module}.weight": (found["A"], found["B"]) for module, found in sorted(sides.items())}


def scaling(adapter: Checkpoint, weight_name: str) -> float:
    """The factor s of s · B A: alpha / r, or alpha / √r for rsLoRA, with rank and alpha patterns honoured."""
    config = adapter.config
    module = weight_name.removesuffix(".weight")

    def patterned(key: str, default: float) -> float:
        for pattern, value in (config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return default

    rank = patterned("rank_pattern", float(config["r"]))
    alpha = patterned("alpha_pattern", float(config["lora_alpha"]))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def factor_modules(adapter: Checkpoint) -> dict[str, tuple[str, str, float]]:
    """Module path in the base model → (name of A, name of B, scaling s) of the LoRA pair that sits on it."""
    return {
        weight.removesuffix(".weight"): (a, b, scaling(adapter, weight))
        for weight, (a, b) in factor_pairs(adapter).items()
    }


@dataclass(frozen=True)
class LoraProductVector:
    """τ of the weights: s_k B_k A_k − s_a B_a A_a, the second term absent for an adapter on an aligned model.

    Attributes:
        tuned: The tuned adapter.
        safe: The aligned adapter on the same base, or None.
        model: The base model's checkpoint, which holds the weights.
    """

    tuned: Checkpoint
    safe: Checkpoint | None
    model: Checkpoint

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the base weights that either adapter changes, sorted."""
        names = set(factor_pairs(self.tuned))
        return tuple(sorted(names | set(factor_pairs(self.safe)) if self.safe else names))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the base weight."""
        return self.model.tensors[name].shape

    def aligned(self, name: str) -> Tensor:
        """The base weight with the aligned adapter folded in, float32."""
        weight = self.model.read(name).to(torch.float32)
        return weight if self.safe is None else weight + product(self.safe, name)

    def delta(self, name: str) -> Tensor:
        """The change of the weight from aligned to tuned, float32."""
        tuned = product(self.tuned, name)
        return tuned if self.safe is None else tuned - product(self.safe, name)

    def factor_modules(self) -> None:
        """None: it is over the weights."""
        return None


def product(adapter: Checkpoint, name: str) -> Tensor:
    """S · B A, what an adapter adds to a weight, float32; a zero of shape (1,) for a weight that it does not touch."""
    pairs = factor_pairs(adapter)
    if name not in pairs:
        return torch.zeros(1)
    a, b = (adapter.read(factor).to(torch.float32) for factor in pairs[name])
    return scaling(adapter, name) * (b @ a)
