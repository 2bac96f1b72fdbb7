"""A fusion method with its settings, run over tensors that come one at a time. Knows no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from resafe.fusion.base import FUSION, Companion, Context, FirstPass, Part
from resafe.registry import Method

ReadDeltas = Callable[[str], Sequence[Tensor]]
"""Tensor name → the task vectors of that tensor, one a model."""


@dataclass(frozen=True)
class Fusion:
    """A named fusion method with checked settings.

    Attributes:
        name: Registered name.
        settings: Its settings; missing ones take the method's defaults.
        seed: Seed of random methods.
        models: Names of the task vectors, for keyed randomness.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    models: tuple[str, ...] = ()

    @cached_property
    def _method(self) -> Method:
        return FUSION.get(self.name)

    @property
    def linear(self) -> bool:
        """Whether a shared mask may be applied after the fusion instead of before it."""
        return bool(self._method.traits["linear"]) and not self._whole

    @property
    def part(self) -> Part:
        """What the method must see at once, with these settings."""
        return "tensor" if self._whole else self._method.traits["part"]

    @property
    def _whole(self) -> bool:
        return self.companion is not None and self.companion.whole

    @property
    def weighted_sum(self) -> bool:
        """Whether it is Σ c_k τ_k with factors that do not depend on the task vectors."""
        return bool(self._method.traits["weighted_sum"])

    @property
    def additive(self) -> bool:
        """Whether it is a sum of what it makes of each task vector: masks of their own may be applied after it."""
        return self.weighted_sum or bool(self._method.traits["additive"])

    def resolved(self) -> dict[str, Any]:
        """All settings, defaults included, checked against the method's signature."""
        return dict(self._resolved)

    @cached_property
    def _resolved(self) -> dict[str, Any]:  # asked for again with every part of every tensor
        given = self._method.check(self.settings)
        return {parameter.name: given.get(parameter.name, parameter.default) for parameter in self._method.parameters}

    def rounds(self, scope: Literal["model", "tensor"]) -> int:
        """Rounds of the first pass, if its totals are taken over that scope; else 0."""
        first_pass, settings = self._first_pass, self._resolved
        return 0 if first_pass is None or first_pass.scope(settings) != scope else first_pass.rounds(settings)

    @cached_property
    def companion(self) -> Companion | None:
        """What the method reads beside the task vectors, opened once.

        Raises:
            InputError: It is not there, or damaged.
        """
        opens = self._method.traits["companion"]
        found: Companion | None = opens(self._resolved) if opens is not None else None
        return found

    @property
    def _first_pass(self) -> FirstPass | None:
        found: FirstPass | None = self._method.traits["first_pass"]
        return found

    def summarise(self, deltas: Sequence[Tensor], round_: int, totals: dict[str, Any]) -> Tensor:
        """The summary of one part in a round of the first pass."""
        assert self._first_pass is not None
        return self._first_pass.summarise(deltas, round_, totals)

    def total(self, summaries: Iterable[Tensor], round_: int, totals: dict[str, Any]) -> dict[str, Any]:
        """What the summaries of all parts mean to the next round, or to the method."""
        first_pass, total = self._first_pass, None
        assert first_pass is not None
        for summary in summaries:
            total = summary if total is None else first_pass.add(total, summary)
        return totals if total is None else first_pass.finish(total, round_, totals, self.resolved())

    def gather(self, parts: Callable[[], Iterable[Sequence[Tensor]]]) -> dict[str, Any]:
        """All rounds of the first pass over parts that are gone through once a round; {} for a method without one."""
        totals: dict[str, Any] = {}
        first_pass = self._first_pass
        for round_ in range(first_pass.rounds(self._resolved) if first_pass is not None else 0):
            known = totals
            totals = self.total((self.summarise(part, round_, known) for part in parts()), round_, known)
        return totals

    def statistics(self, names: Iterable[str], read: ReadDeltas) -> dict[str, Any]:
        """Runs the method's first pass over the whole model, one tensor in memory at a time; {} if it needs none."""
        listed = list(names)
        return self.gather(lambda: map(read, listed)) if self.rounds("model") else {}

    def combine(
        self,
        name: str,
        deltas: Sequence[Tensor],
        statistics: dict[str, Any] | None = None,
        weights: Sequence[float] = (),
        start: int = 0,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        """The fused delta of one tensor, or of a part of it, float32.

        Args:
            name: The tensor.
            deltas: The models' task vectors (or weights, for a method that takes these).
            statistics: Totals of its first pass; where they are missing they are taken over what is given.
            weights: The models' coefficients.
            start: Flat index of the part's first entry.
            shape: Shape of the whole tensor; None is that of what is given.
        """
        known = statistics or self.gather(lambda: [deltas])
        context = Context(name, self.seed, self.models, known, tuple(weights), start, shape, self.companion)
        fused: Tensor = self._method.function(deltas, context, **self._resolved)
        return fused
