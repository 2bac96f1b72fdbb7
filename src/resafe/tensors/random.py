"""Counter-based randomness: the value at an index depends only on (seed, name, index), never on layout or threads.

The generator is SplitMix64's finaliser (Steele, Lea, Flood 2014) over key + index · golden ratio, in wrapping
64-bit integer arithmetic, which is exact and the same on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The two's-complement reading of an unsigned 64-bit integer, since torch has no full uint64 arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def stream_key(seed: int, *names: str) -> int:
    """A signed 64-bit key for one stream of random numbers, from a seed and any names (model, tensor, purpose)."""
    text = "\x00".join((str(seed), *names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


_CHUNK = {"cpu": 1 << 16, "other": 1 << 24}
"""Numbers made at a time. On a CPU the passes over them stay in its cache; elsewhere this bounds the memory only."""


def _mixed(start: int, count: int, key: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """SplitMix64's numbers start … start + count − 1 of a stream: chunks (first number, int64 of all their bits).

    A chunk's memory is used again for the next one.
    """
    chunk = min(_CHUNK.get(device.type, _CHUNK["other"]), count)
    steps = torch.arange(1, chunk + 1, dtype=torch.int64, device=device).mul_(_GOLDEN)
    whole, spare = torch.empty_like(steps), torch.empty_like(steps)
    for first in range(start, start + count, max(1, chunk)):
        size = min(chunk, start + count - first)
        bits = torch.add(steps[:size], _signed((first * _GOLDEN + key) % (1 << 64)), out=whole[:size])
        for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
            # torch's >> on int64 copies the sign bit; the mixing function needs zeros shifted in.
            moved = torch.bitwise_right_shift(bits, shift, out=spare[:size]).bitwise_and_((1 << (64 - shift)) - 1)
            bits.bitwise_xor_(moved)
            if factor != 1:
                bits.mul_(factor)
        yield first, bits


def uniform(
    shape: tuple[int, ...], seed: int, *names: str, start: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform numbers in (0, 1), float32, keyed by (seed, names, flat index).

    Args:
        shape: Shape of the result.
        seed: The run's seed.
        *names: What the numbers are for, e.g. model and tensor name.
        start: Flat index of the first element, so that a chunk of a tensor gets the numbers it has in the whole.
        device: Where to make them; the bits do not depend on it.
    """
    found = torch.empty(math.prod(shape), dtype=torch.float32, device=device)
    for at, bits in _mixed(start, len(found), stream_key(seed, *names), found.device):
        upper = bits.bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1)
        found[at - start : at - start + len(bits)].copy_(upper.to(torch.float64).add_(0.5).div_(1 << 53))
    # Rounding to float32 may give exactly 1, whose logit is infinite: keep strictly inside the interval.
    return found.clamp_(1e-7, 1 - 6e-8).reshape(shape)


def bernoulli(
    shape: tuple[int, ...],
    probability: float,
    seed: int,
    *names: str,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Ones with the given probability and zeros otherwise, float32, keyed as in `uniform`.

    The probability is rounded to a multiple of 2⁻³². One 64-bit number serves two neighbouring entries.
    """
    count = math.prod(shape)
    kept = torch.empty(count, dtype=torch.float32, device=device)
    bound = round(probability * (1 << 32)) - (1 << 31)  # among signed 32-bit integers
    if not -(1 << 31) < bound < (1 << 31):
        return kept.fill_(float(bound > 0)).reshape(shape)
    first, last = start // 2, (start + count + 1) // 2
    for at, bits in _mixed(first, last - first, stream_key(seed, *names), kept.device):
        low = max(2 * at, start)
        high = min(2 * (at + len(bits)), start + count)
        draws = bits.view(torch.int32)[low - 2 * at : high - 2 * at]
        torch.lt(draws, bound, out=kept[low - start : high - start])
    return kept.reshape(shape)


def shuffled(tensor: Tensor, seed: int, *names: str) -> Tensor:
    """The tensor's entries in a random order that depends only on (seed, names) and the number of entries."""
    order = uniform((tensor.numel(),), seed, *names, device=tensor.device).argsort(stable=True)
    return tensor.flatten()[order].reshape(tensor.shape)
