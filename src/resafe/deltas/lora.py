"""LoRA adapters as changes of the weights they sit on: s · B A, formed only when a tensor is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from resafe.checkpoints import Checkpoint, base_tensor, check_additive, rewriting_start
from resafe.checkpoints.adapter import VARIANTS, over_experts
from resafe.errors import InputError

_FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")

_AS_WEIGHTS = (
    "this is done over LoRA's A and B only: take the adapter as its weights (space: weights), or merge it into its "
    "model (merge_and_unload of PEFT) and give the merged model"
)


def is_plain(adapter: Checkpoint) -> bool:
    """Whether an adapter is W + s B A on linear layers and nothing else, so that its files alone tell its weights.

    DoRA, trained biases and modules, embeddings, LoHa and other kinds are more; only PEFT knows what they compute.
    """
    config = adapter.config
    known = str(config.get("peft_type", "LORA")).upper() == "LORA" and not any(config.get(field) for field in VARIANTS)
    found = [(_FACTOR.match(name), info.shape) for name, info in adapter.tensors.items()]
    linear = all(factor and len(shape) == 2 and not over_experts(factor["module"]) for factor, shape in found)
    return known and linear and rewriting_start(config) is None


def factor_pairs(adapter: Checkpoint) -> dict[str, tuple[str, str]]:
    """Base weight name → names of its (A, B) factors in the adapter.

    Raises:
        InputError: The adapter is more than LoRA's A and B (see `is_plain`), or a factor lacks its partner.
    """
    check_additive(adapter)
    sides: dict[str, dict[str, str]] = {}
    for name in adapter.tensors:
        match = _FACTOR.match(name)
        if match is None or over_experts(match["module"]):
            raise InputError(
                f"{adapter.reference}: tensor '{name}' is not a LoRA factor of a linear layer",
                _AS_WEIGHTS,
            )
        sides.setdefault(match["module"], {})[match["side"]] = name
    if field := next((field for field in VARIANTS if adapter.config.get(field)), None):
        raise InputError(
            f"{adapter.reference}: is more than LoRA's factors ({field})",
            _AS_WEIGHTS,
        )
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


def stored_name(weight: str, model: Checkpoint) -> str | None:
    """The name in a model's files of a weight of the loaded model, which may have a prefix that the files leave out."""
    module, _, leaf = weight.rpartition(".")
    return base_tensor(module, model, leaf=leaf)


def transposed(adapter: Checkpoint) -> bool:
    """Whether the weights that an adapter changes are stored as (in, out), as those of GPT-2's Conv1D are."""
    return bool(adapter.config.get("fan_in_fan_out"))


def _changed_weights(adapter: Checkpoint, model: Checkpoint) -> dict[str, str]:
    """Name in the model's files → name in the loaded model, of every weight that an adapter changes.

    Raises:
        InputError: The model stores no weight of its own for a module.
    """
    found = {}
    for weight in factor_pairs(adapter):
        stored = stored_name(weight, model)
        if stored is None:
            raise InputError(
                f"{adapter.reference} changes '{weight}', for which {model.reference} stores no tensor of its own",
                "an output layer may be tied to the embedding, which is not to change: use space: factors",
            )
        found[stored] = weight
    return found


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
        """Names, as in the base's files, of the weights that either adapter changes, sorted."""
        return tuple(sorted(self._weights))

    @cached_property
    def _weights(self) -> dict[str, str]:
        """Name in the model's files → name in the adapters."""
        adapters = [self.tuned] if self.safe is None else [self.tuned, self.safe]
        return {stored: weight for one in adapters for stored, weight in _changed_weights(one, self.model).items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the base weight."""
        return self.model.tensors[name].shape

    def aligned(self, name: str) -> Tensor:
        """The base weight with the aligned adapter folded in, float32."""
        weight = self.model.read(name).to(torch.float32)
        return weight if self.safe is None else weight + product(self.safe, self._weights[name])

    def delta(self, name: str) -> Tensor:
        """The change of the weight from aligned to tuned, float32."""
        weight = self._weights[name]
        tuned = product(self.tuned, weight)
        return tuned if self.safe is None else tuned - product(self.safe, weight)

    @property
    def adapter(self) -> None:
        """None: it is over the weights."""
        return None

    def factor_modules(self) -> None:
        """None: it is over the weights."""
        return None


def product(adapter: Checkpoint, name: str) -> Tensor:
    """S · B A, what an adapter adds to a weight, float32; a zero of shape (1,) for a weight that it does not touch.

    Args:
        adapter: The adapter.
        name: The weight's name in the loaded model, or in the files of the adapter's base.

    Returns:
        The change in the shape that the weight is stored in.
    """
    pairs = factor_pairs(adapter)
    if name not in pairs and adapter.base is not None:
        name = next((weight for weight in pairs if stored_name(weight, adapter.base) == name), name)
    if name not in pairs:
        return torch.zeros(1)
    a, b = (adapter.read(factor).to(torch.float32) for factor in pairs[name])
    change = scaling(adapter, name) * (b @ a)
    return change.T if transposed(adapter) else change
