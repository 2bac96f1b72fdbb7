"""The protocol of a task vector τ = θ_tuned − θ_aligned, by tensor name; nothing is computed until a tensor is read."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from resafe.checkpoints import Checkpoint


class TaskVector(Protocol):
    """What fine-tuning changed, tensor by tensor."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that the vector covers, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, known from the headers."""
        ...

    def aligned(self, name: str) -> Tensor:
        """The aligned tensor that the task vector is added to, float32."""
        ...

    def delta(self, name: str) -> Tensor:
        """The task vector's tensor θ_tuned − θ_aligned, float32."""
        ...

    @property
    def adapter(self) -> Checkpoint | None:
        """For a vector over the tensors of an adapter: the tuned one; None for a vector over weights."""
        ...

    def factor_modules(self) -> dict[str, tuple[str, str, float]] | None:
        """For a vector over LoRA's factors and nothing else: module → (name of A, name of B, scaling s); else None."""
        ...
