"""A loaded language model with an output layer that sees chosen positions only. Knows no loss and no trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def output_of(model: Any, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In it, the model's logits are those of the hidden states that `select` chooses, (1, chosen, vocabulary).

    A vocabulary-sized product for every position is a third of a training step on a CPU. transformers' own
    `logits_to_keep` leaves a strided slice, and torch multiplies that row by row, reading the whole layer each time.

    Args:
        model: A causal LM of transformers, or a PEFT model around one.
        select: Last hidden states (batch, length, width) → those wanted (chosen, width).
    """

    def only(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (select(inputs[0]).unsqueeze(0), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(only)
    try:
        yield
    finally:
        handle.remove()
