"""Sampled decoding whose draws are counted, not taken in turn: knows logits and numbers, no model and no batch.

The token at step `i` of an answer depends on (seed, prompt, i) and the logits alone: one uniform number is looked up
in the cumulative distribution, so that a prompt gives the same sample in any batch, on any device and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from resafe.errors import InputError
from resafe.tensors.random import uniform


@dataclass(frozen=True, order=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: Divides the logits; above 0.
        top_k: Only the k likeliest tokens; 0 is no bound.
        top_p: Only the likeliest tokens that reach this share together, at least one; after `top_k`.
        seed: Seed of the draws.

    Raises:
        InputError: A value out of range.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}",
                "temperature must be above 0 (0 is greedy), top_k at least 0, top_p above 0 and at most 1",
            )


def uniforms(prompt: Sequence[int], limit: int, seed: int) -> torch.Tensor:
    """The numbers of an answer's steps, float32 (limit,) on the CPU, keyed by (seed, the prompt's tokens)."""
    return uniform((limit,), seed, "sample", " ".join(map(str, prompt)))


def draw(logits: torch.Tensor, numbers: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """One token a row.

    Args:
        logits: (rows, vocabulary), any dtype.
        numbers: One uniform number a row, (rows,).
        sampling: Temperature and bounds.

    Returns:
        Token ids, (rows,), int64.
    """
    shares = torch.softmax(logits.float() / sampling.temperature, dim=-1).double()
    targets = numbers.to(shares.device, torch.float64)[:, None]
    if not sampling.top_k and sampling.top_p == 1.0:
        return _look_up(shares, targets)
    shares, tokens = shares.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        shares[:, sampling.top_k :] = 0
        shares /= shares.sum(-1, keepdim=True)
    before = shares.cumsum(-1) - shares
    shares[before >= sampling.top_p] = 0
    return tokens.gather(1, _look_up(shares, targets)[:, None])[:, 0]


def _look_up(shares: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The first place whose cumulative share passes the target's part of the whole."""
    cumulative = shares.cumsum(-1)
    places = torch.searchsorted(cumulative, targets * cumulative[:, -1:], right=True)
    return places[:, 0]  # never past the last share: the numbers are float32 below 1, the sums float64
