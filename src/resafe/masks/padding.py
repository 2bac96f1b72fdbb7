"""Whether a model minds padding on the left: found out once, and kept with the model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from resafe.errors import InputError
from resafe.masks.batches import Item
from resafe.masks.logits import MaskLogits
from resafe.masks.losses import UNPADDED, Encoded, answer_logits
from resafe.masks.processes import ALONE, Processes

_LONG, _SHORT = 12, 5
"""Tokens of the two sequences that are tried."""


def check_padding(
    model: Any, logits: MaskLogits, items: Sequence[Item], pad_id: int, processes: Processes = ALONE
) -> None:
    """Finds out, once for a model, whether it may be given sequences that are padded on the left.

    Models that carry state along the sequence and take no notice of the attention mask (RWKV, RecurrentGemma) have seen
    the padding before the first token. From here on each of their sequences is computed alone.

    Args:
        model: The model with masks installed.
        logits: Its logits.
        items: Encoded items; tokens of the first are used.
        pad_id: Padding token.
        processes: This process among those over which the model is sharded.

    Raises:
        InputError: The model minds padding, and several processes compute.
    """
    if hasattr(model, UNPADDED):
        return
    setattr(model, UNPADDED, False)
    tokens = items[0].chosen.prompt + items[0].chosen.answer
    tokens = (tokens * _LONG)[:_LONG]
    long, short = Encoded(tokens[:-2], tokens[-2:]), Encoded(tokens[: _SHORT - 2], tokens[_SHORT - 2 : _SHORT])
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()  # dropout would make the two differ, and use up random numbers
        with torch.no_grad(), logits.reading("zeros"):
            padded, _, rows = answer_logits(model, [long, short], pad_id)
            alone, _, _ = answer_logits(model, [short], pad_id)
    finally:
        for module, training in modes:
            module.training = training
    differs = float((padded[rows == 1].log_softmax(-1) - alone.log_softmax(-1)).abs().mean())
    exact = all(value.dtype == torch.float32 for value in model.parameters())
    minds = differs > (1e-2 if exact else 0.1)  # far from float noise; what padding does to a state is more
    if not processes.agree(not minds):
        setattr(model, UNPADDED, True)
        if processes.world > 1:
            raise InputError(
                f"{type(model).__name__} computes padded sequences otherwise than single ones, and several processes "
                "share batches",
                "use one process: it computes the sequences one at a time",
            )
        warnings.warn(
            f"{type(model).__name__} computes padded sequences otherwise than single ones (it ignores the attention "
            "mask): sequences go through it one at a time, which is slower",
            stacklevel=2,
        )
