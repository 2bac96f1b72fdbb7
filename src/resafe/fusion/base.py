"""What a fusion method is: task vectors of one tensor in, one delta out, with an optional pass over the model first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from resafe.registry import Registry

FUSION = Registry("fusion method", "resafe.fusion")


Part = Literal["entry", "row", "tensor"]
"""What a method must see at once: any run of entries, whole rows of the last dimension, or the whole tensor."""


@dataclass(frozen=True)
class Context:
    """What a method may know beside the task vectors of the part of one tensor that it is given.

    Attributes:
        name: The tensor's name; keys randomness.
        seed: The run's seed.
        models: Names of the task vectors, in order; key randomness. Empty: their numbers.
        statistics: Totals of the method's first pass (see `FirstPass`), empty without one.
        weights: The models' coefficients for this tensor. Empty: 1 each.
        start: Flat index, in the whole tensor, of the part's first entry; a part consists of whole rows.
        shape: The whole tensor's shape. None: that of the task vectors given.
        companion: What the method's settings opened (see `Companion`).
    """

    name: str
    seed: int = 0
    models: tuple[str, ...] = ()
    statistics: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    start: int = 0
    shape: tuple[int, ...] | None = None
    companion: Any = None

    def model(self, index: int) -> str:
        """A name for the k-th task vector; no number alone, by which `realign`'s method DARE keys its own draws."""
        return self.models[index] if self.models else f"model {index}"

    def weighted(self, count: int, scale: float = 1.0) -> list[float]:
        """The coefficients of `count` models, times `scale`."""
        return [scale * weight for weight in self.weights] if self.weights else [scale] * count


class FirstPass(Protocol):
    """Statistics that a method needs before it can combine: a small summary of each part, and how two add up.

    Parts come in any size and order, from any thread or machine; integers add up exactly, floating-point summaries
    are added in the order of the plan.
    """

    def scope(self, settings: dict[str, Any]) -> Literal["model", "tensor"]:
        """What the totals are taken over."""
        ...

    def rounds(self, settings: dict[str, Any]) -> int:
        """How often all parts are gone through."""
        ...

    def summarise(self, deltas: Sequence[Tensor], round_: int, totals: dict[str, Any]) -> Tensor:
        """The summary of one part."""
        ...

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """The summary of two parts together."""
        ...

    def finish(self, total: Tensor, round_: int, totals: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """What a round's total means to the next round, or to the method."""
        ...


@dataclass(frozen=True)
class Inputs:
    """What is known of a fusion's models before a tensor is read.

    Attributes:
        shapes: Shapes of the base's floating-point tensors, by name.
        models: The models' names.
        adapters: For each model that is an adapter the shapes of its own tensors, by their names in its file; None for
            a full model.
    """

    shapes: Mapping[str, tuple[int, ...]]
    models: Sequence[str]
    adapters: Sequence[Mapping[str, tuple[int, ...]] | None]


class Companion(Protocol):
    """What a method reads beside the task vectors, a mask for example: opened from its settings, headers only."""

    @property
    def digest(self) -> str:
        """SHA-256 of all that it holds."""
        ...

    @property
    def whole(self) -> bool:
        """Whether the method then needs whole tensors, whatever it needs otherwise."""
        ...

    @property
    def base(self) -> str | None:
        """The digest of the one base it belongs to; None where it fits any or does not say."""
        ...

    def problems(self, inputs: Inputs) -> list[str]:
        """Why it cannot be used with these models."""
        ...

    def notes(self, inputs: Inputs) -> list[str]:
        """What a user should know of its use with them."""
        ...

    def touches(self, name: str) -> bool:
        """Whether the method may change the tensor of the base; if not, the base's is taken as it is."""
        ...

    def reads(self, model: int, name: str, stored: Tensor) -> Tensor:
        """What is to be used for a tensor of an adapter's file, float32: itself, or a changed copy."""
        ...


def any_number(count: int) -> list[str]:
    """No limit on the number of models."""
    return []


def exactly(needed: int) -> Callable[[int], list[str]]:
    """A check that there are so many models."""
    return lambda count: [] if count == needed else [f"the method takes {needed} models, {count} are given"]


def at_least(needed: int) -> Callable[[int], list[str]]:
    """A check that there are so many models or more."""
    return lambda count: [] if count >= needed else [f"the method takes at least {needed} models, {count} are given"]


def fusion_method(
    name: str,
    *,
    title: str,
    source: str,
    linear: bool = False,
    affine: bool = False,
    weighted_sum: bool = False,
    additive: bool = False,
    inputs: Literal["deltas", "weights"] = "deltas",
    part: Part = "entry",
    first_pass: FirstPass | None = None,
    companion: Callable[[dict[str, Any]], Companion] | None = None,
    check: Callable[[int], list[str]] = any_number,
) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function `(deltas, context, *, settings…) -> Tensor` as a fusion method.

    The function gets float32 task vectors of equal shape, one a model, of a part of one tensor, and does not
    change them; it returns the fused delta of that part.

    Args:
        name: Its name in recipes.
        title: One line for people.
        source: Paper.
        linear: F(m ⊙ τ) = m ⊙ F(τ) for every shared mask m, so that training may apply F once beforehand.
        affine: F(τ + c) = F(τ) + c for every shared c: whole weights may be given in place of task vectors, and the
            base need not be read.
        weighted_sum: F(τ) = Σ c_k τ_k with factors that do not depend on the task vectors: of adapters, an adapter.
        additive: F(τ) = Σ F_k(τ_k) with F_k linear: masks of their own may be applied after it. A weighted sum is that.
        inputs: Whether the function takes task vectors and gives a delta, or takes and gives whole weights.
        part: What the function must see at once.
        first_pass: Statistics that it needs first.
        companion: Opens, from all settings, what it reads beside the task vectors.
        check: Problems with a number of models.
    """
    return FUSION.register(
        name, title=title, source=source, linear=linear, affine=affine, weighted_sum=weighted_sum, additive=additive,
        inputs=inputs, part=part, first_pass=first_pass, companion=companion, check=check,
    )  # fmt: skip
