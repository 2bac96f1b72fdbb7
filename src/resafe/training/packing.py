"""Packing: examples end to end in one row, each seeing itself alone. Knows models, no trainer and no data.

TRL joins the examples of a forward pass, starts their positions anew and names their borders (`cu_seq_lens_q`,
`seq_idx`); transformers makes a block-diagonal mask of the positions. A layer that carries a state along the row
(Mamba's, for example) knows no such mask, and honours the borders or does not: then an example would see those before
it, and nothing in the loss would show it. So it is tried before training, on the inputs that training gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from resafe.errors import InputError

_TRIED = 48  # tokens of each of the two examples that are tried
_SHARE = 0.1  # of a leak's effect; rounding in bfloat16 stays far below
_HINT = "leave out packing: rows of similar length go together anyway"


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
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = _logits(model, [second])
            packed = _logits(model, [first, second])[len(first) :]
            leaking = _logits(model, [first + second])[len(first) :]
    except TypeError as refusal:  # a forward that takes no borders of examples
        raise InputError(f"this model does not take packed rows: {refusal}", _HINT) from refusal
    finally:
        model.train(training)
    error, leak = (float((logits - alone).abs().max()) for logits in (packed, leaking))
    if error > _SHARE * leak + 1e-3:
        raise InputError(
            f"this model does not keep packed examples apart (logits differ by {error:.2g}, by {leak:.2g} if they were "
            "one text)",
            _HINT,
        )


def _logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Logits of each position of rows that TRL's collator has laid end to end: (tokens, vocabulary)."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    given = collate([{"input_ids": row, "labels": row} for row in rows])
    del given["labels"]
    device = model.get_input_embeddings().weight.device
    moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in given.items()}
    logits: torch.Tensor = model(**moved, use_cache=False).logits[0].float()
    return logits
