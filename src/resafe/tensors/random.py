"""Counter-based randomness: the value at an index depends only on (seed, name, index), never on layout or threads.

The generator is SplitMix64's finaliser (Steele, Lea, Flood 2014) over key + index · golden ratio, in wrapping
64-bit integer arithmetic, which is exact and the same on every device.
"""

from __future__ import annotations

import hashlib
import math

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


def _mix(bits: Tensor, spare: Tensor) -> Tensor:
    """SplitMix64's finaliser in place, then the upper 53 bits; `spare` has the shape of `bits`."""

    def shifted(count: int) -> Tensor:
        # torch's >> on int64 copies the sign bit; the mixing function needs zeros shifted in.
        return torch.bitwise_right_shift(bits, count, out=spare).bitwise_and_((1 << (64 - count)) - 1)

    bits.bitwise_xor_(shifted(30)).mul_(_MIX_1)
    bits.bitwise_xor_(shifted(27)).mul_(_MIX_2)
    bits.bitwise_xor_(shifted(31))
    return shifted(11)


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
    count = math.prod(shape)
    key = stream_key(seed, *names)
    found = torch.empty(count, dtype=torch.float32, device=device)
    chunk = _CHUNK.get(found.device.type, _CHUNK["other"])
    steps = torch.arange(1, min(chunk, count) + 1, dtype=torch.int64, device=device).mul_(_GOLDEN)
    bits, spare = torch.empty_like(steps), torch.empty_like(steps)
    fraction = torch.empty_like(steps, dtype=torch.float64)
    for first in range(0, count, chunk):
        size = min(chunk, count - first)
        offset = _signed(((start + first) * _GOLDEN + key) % (1 << 64))
        torch.add(steps[:size], offset, out=bits[:size])
        fraction[:size].copy_(_mix(bits[:size], spare[:size])).add_(0.5).div_(1 << 53)
        found[first : first + size].copy_(fraction[:size])
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
    """Ones with the given probability and zeros otherwise, float32, keyed as in `uniform`."""
    return (uniform(shape, seed, *names, start=start, device=device) < probability).to(torch.float32)


def shuffled(tensor: Tensor, seed: int, *names: str) -> Tensor:
    """The tensor's entries in a random order that depends only on (seed, names) and the number of entries."""
    order = uniform((tensor.numel(),), seed, *names, device=tensor.device).argsort(stable=True)
    return tensor.flatten()[order].reshape(tensor.shape)
