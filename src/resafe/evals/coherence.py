"""Perplexity on plain texts: whether a repaired model still writes its language. Knows nothing of chat templates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from resafe.checkpoints.attention import short_attention
from resafe.checkpoints.output import output_of
from resafe.errors import InputError

_MAX_POSITIONS = 1 << 10  # of a batch: its logits, one vocabulary a position, would be the peak of a run's memory


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of a model on texts.

    Attributes:
        nll_per_text: Negative log-likelihood of each text in nats, summed over its predicted tokens.
        tokens_per_text: How many tokens of each text were predicted.
        value: exp(sum of `nll_per_text` / sum of `tokens_per_text`): each token weighs the same.
    """

    nll_per_text: tuple[float, ...]
    tokens_per_text: tuple[int, ...]
    value: float


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 16) -> PerplexityResult:
    """Measures the token-weighted perplexity of a causal language model on texts.

    A text is encoded with the special tokens that the tokenizer adds by itself; if that is no beginning-of-sequence
    token, its first token is not predicted. Texts are sorted by length and padded on the right.

    Args:
        model: A causal language model of transformers; runs on its own device, without dropout.
        tokenizer: Its tokenizer.
        texts: Plain texts of at least two tokens each.
        batch_size: Most texts that run together; batches of long texts are smaller.

    Raises:
        InputError: No texts, a batch size below 1, or a text of fewer than two tokens.
    """
    if not texts or batch_size < 1:
        raise InputError(f"{len(texts)} texts in batches of {batch_size}", "both must be at least 1")
    encoded: list[list[int]] = tokenizer(list(texts))["input_ids"]
    for place, ids in enumerate(encoded):
        if len(ids) < 2:
            raise InputError(f"text {place} has {len(ids)} tokens", "perplexity needs two or more in each text")
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    nll = [0.0] * len(encoded)
    training = model.training
    model.eval()
    try:
        start = 0
        while start < len(order):
            width = len(encoded[order[start]])
            batch = order[start : start + max(1, min(batch_size, _MAX_POSITIONS // width))]
            for index, value in zip(batch, _batch_nll(model, [encoded[i] for i in batch]), strict=True):
                nll[index] = value
            start += len(batch)
    finally:
        model.train(training)
    counts = [len(ids) - 1 for ids in encoded]
    return PerplexityResult(tuple(nll), tuple(counts), math.exp(math.fsum(nll) / sum(counts)))


@torch.inference_mode()
def _batch_nll(model: Any, rows: list[list[int]]) -> list[float]:
    """Summed negative log-likelihood of each row, in nats; sums in float64."""
    width = max(map(len, rows))
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    real = mask[:, 1:].bool()
    with short_attention(model, width), output_of(model, lambda hidden: hidden[:, :-1][real]):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    losses = functional.cross_entropy(logits.float(), ids[:, 1:][real], reduction="none")
    sums = torch.zeros(len(rows), dtype=torch.float64, device=losses.device)
    sums.index_add_(0, real.nonzero()[:, 0], losses.double())
    return [float(value) for value in sums.tolist()]
