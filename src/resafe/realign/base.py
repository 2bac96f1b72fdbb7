"""What a realign method gets and gives. A method is a typed function registered by a decorator, one file each.

A method does its expensive part once (train a mask, take gradients) and returns a `Family`: realigned models of
growing strength, from which one is chosen on validation questions. Methods never see a whole model at once: a
member of the family is a function from a tensor's name to its realigned value.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from resafe.data.items import Example, Pair
from resafe.data.material import answered
from resafe.deltas import TaskVector, check_together, origins
from resafe.errors import InputError
from resafe.fusion import Fusion
from resafe.masks import Mask
from resafe.masks.concrete import norm_kept
from resafe.provenance import digest_value
from resafe.registry import Registry

REALIGN = Registry("realign method", "resafe.realign")

BALANCED: Mapping[str, float] = {"safety": 0.4, "harmless": 0.4, "task": 0.2}
"""Composition of training batches: refuse the harmful, help with the harmless, keep the task."""

Realigned = Callable[[str], Tensor]
"""Tensor name → realigned tensor θ, float32, over the names of the task vectors."""


class ModelSource(Protocol):
    """Where a method that needs gradients gets a model from."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        ...

    @property
    def system(self) -> str | None:
        """The system turn of every prompt."""
        ...

    def plain(self, device: str | None = None) -> Any:
        """A fresh model of the aligned architecture without adapters, on the run's device or on the one named.

        Its precision is the run's on either.
        """
        ...


@dataclass(frozen=True)
class Problem:
    """One realignment: aligned + tuned task vectors, how to fuse them, and the data that may be learnt from.

    Attributes:
        vectors: Task vectors over the same tensors, one a tuned model.
        fusion: F; for one tuned model task arithmetic with λ = 1 is the identity.
        pairs: Safety pairs (side "safety") and harmless pairs (side "harmless").
        keep: Task examples whose behaviour should stay.
        keep_of: The place of the tuned model that each of them belongs to; empty where it is not known.
        source: Models and tokenizer for methods that need gradients.
        seed: Seed of everything random.
        work: Directory for checkpoints, or None.
        progress: Called with (step, steps, metrics).
    """

    vectors: Sequence[TaskVector]
    fusion: Fusion = field(default_factory=lambda: Fusion("task_arithmetic"))
    pairs: Sequence[Pair] = ()
    keep: Sequence[Example] = ()
    keep_of: Sequence[int] = ()
    source: ModelSource | None = None
    seed: int = 0
    work: Path | None = None
    progress: Callable[[int, int, dict[str, float]], None] | None = None

    def __post_init__(self) -> None:
        check_together(self.vectors)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that the task vectors cover."""
        return self.vectors[0].names

    def models(self) -> ModelSource:
        """The model source.

        Raises:
            InputError: The method needs a model and none was given.
        """
        if self.source is None:
            raise InputError("this method needs the model and data, not only the weights", "call it through a recipe")
        return self.source

    def sft_examples(self, n: int, shares: Mapping[str, float] = BALANCED) -> list[Example]:
        """About `n` examples in these shares: chosen answers and the task's own examples.

        Raises:
            InputError: A share is of no side, or is negative.
        """
        if unknown := [side for side, share in shares.items() if side not in BALANCED or share < 0]:
            raise InputError(f"shares: {unknown[0]}: {shares[unknown[0]]:g}", f"give shares of {', '.join(BALANCED)}")
        sides: dict[str, list[Example]] = {"task": list(self.keep)}
        for pair in self.pairs:
            sides.setdefault(pair.side, []).append(answered(pair, pair.chosen))
        examples: list[Example] = []
        for side, share in shares.items():
            pool = sides.get(side, [])
            random.Random(f"{self.seed}-{side}").shuffle(pool)
            count = round(n * share) if pool else 0
            examples += [replace(pool[i % len(pool)], id=f"{side}-{i}") for i in range(count)]
        return examples

    def masked(self, *weights: Callable[[str], Tensor | float], keep_norm: bool = False) -> Realigned:
        """θ_a + F({m_k ⊙ τ_k}) by tensor, for masks given by name; F's first pass runs over the masked task vectors.

        Args:
            weights: One mask that all task vectors share, or one for each of them.
            keep_norm: Scale every m ⊙ τ_k to the norm of τ_k.
        """

        def deltas(name: str) -> list[Tensor]:
            masks = [weight(name) for weight in weights] * (len(self.vectors) if len(weights) == 1 else 1)
            found = [vector.delta(name) for vector in self.vectors]
            return [
                norm_kept(delta * mask, delta) if keep_norm else delta * mask
                for delta, mask in zip(found, masks, strict=True)
            ]

        statistics = self.fusion.statistics(self.names, deltas)
        return lambda name: self.vectors[0].aligned(name) + self.fusion.combine(name, deltas(name), statistics)


def checkpoint_digests(problem: Problem) -> dict[str, Any]:
    """Of the aligned and the tuned checkpoints, so that who applies the mask can tell whether it belongs there."""
    pairs = [origins(vector) for vector in problem.vectors]
    aligned, tuned = pairs[0][0], [checkpoint.digest for _, checkpoint in pairs if checkpoint is not None]
    return ({"aligned": aligned.digest} if aligned is not None else {}) | {"tuned": tuned}


def models_digest(problem: Problem) -> str:
    """SHA-256 that tells a problem's models and their fusion from others, as far as checkpoints tell their content."""
    fusion = problem.fusion
    return digest_value([checkpoint_digests(problem), fusion.name, fusion.resolved(), fusion.seed, fusion.models])


@dataclass(frozen=True)
class Family:
    """Realigned models of growing strength.

    Attributes:
        strength: What the strength is called, e.g. "alpha" or "share removed".
        strengths: The grid to choose from, weakest first.
        at: Strength → realigned tensors.
        facts: What the report should say, e.g. the keep rate.
        masks: What was learned, where that is a mask: a portable patch that is stored beside the model. One that all
            tuned models share, or one each.
    """

    strength: str
    strengths: tuple[float, ...]
    at: Callable[[float], Realigned]
    facts: dict[str, Any] = field(default_factory=dict)
    masks: tuple[Mask, ...] = ()

    @property
    def mask(self) -> Mask | None:
        """The mask that all tuned models share, if there is one."""
        return self.masks[0] if len(self.masks) == 1 else None


def check_strengths(strengths: Sequence[float], most: float = math.inf) -> None:
    """Raises an `InputError` where there is no strength, or one that is not from 0 to `most`, and finite."""
    if not strengths:
        raise InputError("no strength is given", "give at least one")
    for strength in strengths:
        if not 0 <= strength <= most or math.isinf(strength):
            wanted = "on; 0 is the tuned model" if math.isinf(most) else f"to {most:g}"
            raise InputError(f"a strength of {strength:g}", f"give a number from 0 {wanted}")


def realign_method(
    name: str, *, title: str, source: str, trains: bool = False, makes_mask: bool = False, later: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function `(problem, **settings) -> Family`.

    `trains` says that it needs the model and data, `makes_mask` that its family carries a mask. `later` names settings
    that do nothing at their defaults and came after stages were first digested; stages that leave them out stay valid.
    """
    return REALIGN.register(name, title=title, source=source, trains=trains, makes_mask=makes_mask, later=later)
