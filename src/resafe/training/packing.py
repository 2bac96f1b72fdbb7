"""Packing: examples end to end in one row, each seeing itself alone. Knows models, no trainer and no data.

TRL joins the examples of a forward pass and starts their positions anew; transformers makes a block-diagonal mask of
those positions. A layer that carries a state along the row (Mamba's, for example) knows no such mask: there an example
would see those before it, and nothing in the loss would show it. So it is tried before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from resafe.errors import InputError

_TRIED = 48  # tokens of each of the two examples that are tried
_SHARE = 0.1  # of a leak's effect; rounding in bfloat16 stays far below


def packed_lengths(order: Sequence[int], lengths: Sequence[int], size: int) -> list[int]:
    """Tokens of each packed row, `size` examples of `order` at a time."""
    return [sum(lengths[index] for index in order[at : at + size]) for at in range(0, len(order), size)]


def check_packing(model: Any, first: Sequence[int], second: Sequence[int]) -> None:
    """Raises InputError if a model lets an example of a packed row see the one before it.

    Args:
        model: A causal language model, or a PEFT model around one.
        first: Token ids of an example.
        second: Those of another.
    """
    first, second = list(first)[:_TRIED], list(second)[:_TRIED]
    restarted = [*range(len(first)), *range(len(second))]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = _logits(model, second, list(range(len(second))))
            packed = _logits(model, first + second, restarted)[len(first) :]
            leaking = _logits(model, first + second, list(range(len(restarted))))[len(first) :]
    finally:
        model.train(training)
    error, leak = (float((logits - alone).abs().max()) for logits in (packed, leaking))
    if error > _SHARE * leak + 1e-3:
        raise InputError(
            f"this model does not keep packed examples apart (logits differ by {error:.2g}, by {leak:.2g} if they were "
            "one text)",
            "leave out packing: rows of similar length go together anyway",
        )


def _logits(model: Any, ids: list[int], positions: list[int]) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    given = {"input_ids": torch.tensor([ids], device=device), "position_ids": torch.tensor([positions], device=device)}
    logits: torch.Tensor = model(**given, use_cache=False).logits[0].float()
    return logits
