"""How many rows to decode together: measured, a few steps a size. Knows a decoder and no texts.

The weights are read once a step however many rows there are, so that tokens per second grow with the batch until the
products themselves take the time, or the cache no longer fits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from resafe.evals.kvcache import buffered_cache, can_share_prefix

if TYPE_CHECKING:
    from resafe.evals.generation import _Decoder

DEFAULT = 128
SIZES = (16, 32, 64, 128, 256, 512, 1024)
_STEPS = 3  # timed of each size, after one that allocates
_GAIN = 1.03  # a larger batch must be this much faster
_LONGEST = 512  # positions of the measurement's cache
MAX_POSITIONS = 1 << 15
"""Positions of a batch, prompts and answers: bounds the cache when prompts are long."""


def measured_batch_size(decoder: _Decoder, encoded: Sequence[list[int]], limits: Sequence[int]) -> int:
    """The number of rows with the most tokens per second, for prompts and answers like these; even batches.

    A step is timed on caches as long as a usual answer's middle. Sizes grow until one is no faster than the last or
    does not fit the memory. Where a cache cannot start from one row's prefix (sliding windows) nothing is measured.

    Args:
        decoder: The decoder that will run.
        encoded: Token ids of the prompts, at least one.
        limits: Most tokens of each answer.
    """
    longest = max(len(ids) + limit for ids, limit in zip(encoded, limits, strict=True))
    most = min(len(encoded), max(1, MAX_POSITIONS // longest))  # what a batch may hold whatever is measured
    sizes = [size for size in SIZES if size < most] + [most]
    if len(encoded) <= SIZES[0] or not can_share_prefix(decoder.config):
        return min(DEFAULT, len(encoded))
    middle = sorted(map(len, encoded))[len(encoded) // 2] + sorted(limits)[len(limits) // 2] // 2
    length = min(_LONGEST, middle)
    best, fastest = SIZES[0], 0.0
    prefix = _prefix(decoder, encoded[0], length)
    for size in sizes:
        try:
            rate = size / _step_seconds(decoder, prefix, length, size)
        except torch.OutOfMemoryError:
            break
        if rate < fastest * _GAIN:
            break
        best, fastest = size, rate
    batches = -(-len(encoded) // best)
    return -(-len(encoded) // batches)  # as many rows in the last batch as in the others


def _prefix(decoder: _Decoder, prompt: list[int], length: int) -> object:
    """A cache of one row and `length` positions; the prompt over and over."""
    cache = buffered_cache(decoder.config, length)
    ids = torch.tensor([(prompt * (length // len(prompt) + 1))[:length]], device=decoder.model.device)
    mask = torch.ones_like(ids)
    decoder._step(ids, mask, torch.arange(length, device=ids.device)[None], cache)
    return cache


def _step_seconds(decoder: _Decoder, prefix: object, length: int, rows: int) -> float:
    """Seconds of one step of a batch: the quickest of a few."""
    device = decoder.model.device
    cache = buffered_cache(decoder.config, length + _STEPS + 1, prefix)  # type: ignore[arg-type]
    ids = torch.full((rows, 1), decoder.pad, device=device)
    seconds = []
    for step in range(_STEPS + 1):
        mask = torch.ones((rows, length + step + 1), dtype=torch.long, device=device)
        positions = torch.full((rows, 1), length + step, device=device)
        start = time.perf_counter()
        decoder._step(ids, mask, positions, cache).argmax(-1).tolist()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
