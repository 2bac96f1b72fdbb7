"""Which attention a loaded model computes with on a CPU. Knows no loss, no trainer and no decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_SHORT = 256  # positions: up to here a whole score matrix of a batch costs little memory
_NAME = "resafe_grouped"


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as plain products, one for all query heads that share a key head.

    The usual eager attention copies every key and value once for each query head first. In decoding, where a query is a
    single position, those copies and the many products of one row cost more than the attention itself.

    Args:
        module: The attention module; says whether it trains.
        query: (batch, heads, positions, width).
        key: (batch, key heads, all positions, width); heads is a multiple of key heads.
        value: As `key`.
        attention_mask: Added to the scores, (batch or 1, 1, positions, all positions); None adds nothing.
        scaling: Factor of the scores; None is 1 / √width.
        dropout: Of the attention weights, in training.

    Returns:
        (batch, positions, heads, width), and None for the weights.
    """
    batch, heads, positions, width = query.shape
    groups, everything = batch * key.shape[1], key.shape[2]
    scaled = query * (width**-0.5 if scaling is None else scaling)
    scores = torch.bmm(scaled.reshape(groups, -1, width), key.reshape(groups, everything, width).transpose(1, 2))
    scores = scores.view(batch, heads, positions, everything)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    mixed = torch.bmm(weights.view(groups, -1, everything), value.reshape(groups, everything, width))
    return mixed.view(batch, heads, positions, width).transpose(1, 2).contiguous(), None


@contextmanager
def short_attention(model: Any, longest: int) -> Iterator[None]:
    """In it, a bfloat16 model on a CPU computes attention over short sequences as plain products.

    torch's fused attention has no fast bfloat16 path on CPUs: at chat lengths it takes a fifth of a training step and
    of decoding, and its backward pass most of that. Everything else is left as it is: float32, GPUs, long sequences
    (whose score matrices would fill memory), and models that are not on torch's fused attention.

    Args:
        model: A causal LM of transformers, or a PEFT model around one.
        longest: Most positions of a sequence inside the block.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    fused = getattr(inner.config, "_attn_implementation", None) == "sdpa"
    weight = next(inner.parameters())
    if not fused or weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or longest > _SHORT:
        yield
        return
    _register()
    inner.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        inner.set_attn_implementation("sdpa")


@contextmanager
def attention_as(model: Any, name: str | None) -> Iterator[None]:
    """In it, the model computes attention as it did when it was said to do so by that name.

    For layers that are computed again in a backward pass, after `short_attention` has ended.
    """
    now = getattr(model.config, "_attn_implementation", None)
    if name is None or name == now:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(now)


def _register() -> None:
    """Makes the attention known to transformers by name, with masks that are added to scores."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, grouped_attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
