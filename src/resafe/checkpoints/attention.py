"""Which attention a loaded model computes with on a CPU. Knows no loss, no trainer and no decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SHORT = 256  # positions: up to here a whole score matrix of a batch costs little memory


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
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    fused = getattr(inner.config, "_attn_implementation", None) == "sdpa"
    weight = next(inner.parameters())
    if not fused or weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or longest > _SHORT:
        yield
        return
    inner.set_attn_implementation("eager")
    try:
        yield
    finally:
        inner.set_attn_implementation("sdpa")
