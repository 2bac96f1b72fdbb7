"""How task vectors stand to the safety vector v = θ_aligned − θ_other: which entries go along with it, which against.

In weight space an entry conflicts where τ_i v_i < 0. Over the factors of an adapter v is still a change of the weight
W = s B A, and an entry conflicts where it takes W against v to first order: τ_i · ∂⟨W, V⟩/∂θ_i < 0, with the gradients
s V Aᵀ for B and s Bᵀ V for A, at the tuned factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from resafe.checkpoints import Checkpoint, open_checkpoint
from resafe.deltas import TaskVector, merged_model, origins
from resafe.deltas.lora import is_plain, product, stored_name, transposed
from resafe.errors import InputError
from resafe.masks import MaskLogits
from resafe.masks.concrete import collected
from resafe.masks.logits import whole
from resafe.realign.base import Problem


@dataclass(frozen=True)
class SafetyVector:
    """V = θ_aligned − θ_other by the name of a weight, float32; nothing is read before it is asked for.

    Attributes:
        aligned: The aligned checkpoint.
        other: The model before alignment (θ_b), or the aligned one after harmful tuning (θ_u).
    """

    aligned: Checkpoint
    other: Checkpoint

    def weight(self, name: str) -> Tensor:
        """V of one weight of the model, by its name in the files or in the loaded model.

        Raises:
            InputError: The two models have no such tensor in common.
        """
        change = _adapted(self.aligned, name) - _adapted(self.other, name)
        one, two = (checkpoint.base or checkpoint for checkpoint in (self.aligned, self.other))
        if one.digest == two.digest:
            return change
        weights = _stored(one, name), _stored(two, name)
        if weights[0].shape != weights[1].shape:
            raise InputError(
                f"'{name}' has shape {tuple(weights[1].shape)} in {two.reference} and {tuple(weights[0].shape)} in "
                f"{one.reference}", "give a model of the same architecture",
            )  # fmt: skip
        return weights[0] - weights[1] + change


def _stored(model: Checkpoint, name: str) -> Tensor:
    stored = stored_name(name, model)
    if stored is None:
        raise InputError(f"{model.reference} has no tensor '{name}'", "base and unaligned name whole models")
    return model.read(stored).to(torch.float32)


def _adapted(checkpoint: Checkpoint, name: str) -> Tensor:
    """What an adapter adds to a weight; zero for a model."""
    return product(checkpoint, name) if checkpoint.kind == "adapter" else torch.zeros(1)


def safety_vector(problem: Problem, base: str | None, unaligned: str | None) -> SafetyVector:
    """The safety vector of a problem.

    Args:
        problem: The realignment.
        base: The model before alignment; None takes the one that an aligned adapter lies on.
        unaligned: The aligned model after harmful tuning, in place of `base`.

    Raises:
        InputError: Both are given, or neither and the aligned model is no adapter.
    """
    aligned, _ = origins(problem.vectors[0])
    if base and unaligned:
        raise InputError(
            "base and unaligned are both given", "the safety vector is aligned − base or aligned − unaligned"
        )
    if aligned is None:
        raise InputError("the aligned checkpoint of these task vectors is not known", "open both as checkpoints")
    named = base or unaligned
    if named is not None:
        return SafetyVector(_readable(aligned), _readable(open_checkpoint(named)))
    if aligned.base is None:
        raise InputError(
            f"{aligned.reference} is a whole model, and what it was before alignment is not known",
            "give base: (the model before alignment) or unaligned: (the aligned one after harmful tuning)",
        )
    return SafetyVector(_readable(aligned), aligned.base)


def _readable(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, or what PEFT makes of an adapter that is more than LoRA's factors."""
    return checkpoint if checkpoint.kind == "model" or is_plain(checkpoint) else merged_model(checkpoint)


def agreements(logits: MaskLogits, problem: Problem, safety: SafetyVector) -> dict[str, Tensor]:
    """τ · v of all that shares a logit: negative where the task vector goes against the safety vector.

    Args:
        logits: The masks' logits; tells the masked tensors, and what shares one.
        problem: The task vectors; where they share a mask their products are added up.
        safety: v.

    Returns:
        Key → sum of products, float32, shape of the logits.
    """
    found: dict[str, Tensor] = {}
    for task, vector in enumerate(problem.vectors):
        toward = _toward(vector, safety)
        for name in logits.shapes:
            key = logits.key(name, task if logits.tasks > 1 else 0)
            entries = vector.delta(name) * toward(name)
            part = collected(name, entries, tuple(logits.values[key].shape), logits.settings)
            found[key] = found[key] + part if key in found else part
    return found


def _toward(vector: TaskVector, safety: SafetyVector) -> Callable[[str], Tensor]:
    """∂⟨W, V⟩ with respect to a tensor of the tuned model."""
    modules, adapter = vector.factor_modules(), vector.adapter
    if modules is None and adapter is not None:
        raise InputError(
            f"{adapter.reference} is more than LoRA's factors A and B, whose part in the weights is known",
            "to compare it with the safety vector take it as its weights (space: weights)",
        )
    if modules is None:
        return safety.weight
    turned = adapter is not None and transposed(adapter)
    partners = {
        name: (f"{module}.weight", a, b, scale)
        for module, (a, b, scale) in modules.items()
        for name in (a, b)
    }  # fmt: skip

    def gradient(name: str) -> Tensor:
        weight, a, b, scale = partners[name]
        v = safety.weight(weight)
        if v.dim() < 2:  # neither model changes this weight
            return torch.zeros(vector.shape(name))
        v = v.T if turned else v
        other = b if name == a else a
        tuned = vector.aligned(other) + vector.delta(other)
        return scale * (tuned.T @ v if name == a else v @ tuned.T)

    return gradient


def fixed_outside(values: Mapping[str, Tensor], agreement: Mapping[str, Tensor], kept: float) -> dict[str, Tensor]:
    """The logits with `kept` wherever the task vector does not go against the safety vector."""
    return {
        key: torch.where(agreement[key] < 0, whole(value.detach()).cpu().float(), kept) for key, value in values.items()
    }
