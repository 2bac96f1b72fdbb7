"""A loaded language model of which the output layer sees chosen positions, or runs alone. Knows no loss, no trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_PASSED_ON = ("cross_attentions", "state", "cache_params")
"""What models beside those of transformers' usual output pass on from their decoder (GPT-2, RWKV, Mamba)."""


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


@contextmanager
def decoder_gives(model: Any, hidden: Tensor) -> Iterator[None]:
    """In it, the model's decoder gives these last hidden states whatever it is called with, and computes nothing.

    A call of the model is then what it does after its decoder: the output layer, and what some do with its logits
    (Gemma's soft-capping, Cohere's and Granite's scales). Only for models that hand hidden states to the output layer
    as the decoder gave them, and that call the decoder as a whole: whether one does is for the caller to try.

    Args:
        model: A causal LM of transformers.
        hidden: Last hidden states, (batch, positions, width), as `output_of` selects them.

    Raises:
        TypeError: The model is its own decoder.
    """
    from transformers.modeling_outputs import MoeModelOutputWithPast

    decoder = model.get_decoder()
    if decoder is model:
        raise TypeError(f"{type(model).__name__} has no decoder of its own")
    before = vars(decoder).get("forward")
    given = MoeModelOutputWithPast(last_hidden_state=hidden)
    for name in _PASSED_ON:
        setattr(given, name, None)
    # Not by nn.Module's own setting, which masked modules change.
    object.__setattr__(decoder, "forward", lambda *_, **__: given)
    try:
        yield
    finally:
        object.__delattr__(decoder, "forward")
        if before is not None:
            object.__setattr__(decoder, "forward", before)
