"""Exact k-th largest magnitudes of whole models or tensors, out of core: a radix histogram on the bits of float32.

Two rounds. The first counts the upper 16 bits of |x|, which orders magnitudes coarsely; the second counts the
lower 15 bits inside the bin where the k-th value lies. Histograms of tensors, threads and machines add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

_LOW_BITS = 15


def _magnitude_bits(delta: Tensor) -> Tensor:
    # For non-negative floats the order of the values is the order of their bits read as integers.
    return delta.detach().to(torch.float32).abs().contiguous().flatten().view(torch.int32)


def histogram(bits: Tensor, round_: int, bins: Sequence[int]) -> Tensor:
    """Counts of one tensor's magnitude bits, int64: (65536,) in round 0, (len(bins), 32768) in round 1."""
    size = 1 << (16 if round_ == 0 else _LOW_BITS)
    if round_ == 0:
        return torch.bincount(bits >> _LOW_BITS, minlength=size)
    high = bits >> _LOW_BITS
    return torch.stack([torch.bincount(bits[high == bin_] & (size - 1), minlength=size) for bin_ in bins])


@dataclass(frozen=True)
class MagnitudeRanks:
    """First pass of methods that need the magnitude at which the largest shares of a task vector end.

    `finish` of the last round puts, for each task vector, one threshold a share under "thresholds": the magnitude of
    the last entry inside the share, or infinity where the share holds none.

    Attributes:
        shares: Settings → shares, each 0 to 1.
    """

    shares: Callable[[dict[str, Any]], Sequence[float]]

    def scope(self, settings: dict[str, Any]) -> Literal["model", "tensor"]:
        """Tensor by tensor, unless the method's setting of that name says otherwise."""
        return "model" if settings.get("scope") == "model" else "tensor"

    def rounds(self, settings: dict[str, Any]) -> int:
        """Two."""
        return 2

    def summarise(self, deltas: Sequence[Tensor], round_: int, totals: dict[str, Any]) -> Tensor:
        """Histograms of one part: (models, 65536) in round 0, (models, shares, 32768) in round 1."""
        bins = totals.get("bins") or [()] * len(deltas)
        return torch.stack(
            [histogram(_magnitude_bits(delta), round_, own) for delta, own in zip(deltas, bins, strict=True)]
        )

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum of two summaries."""
        return a + b

    def finish(self, total: Tensor, round_: int, totals: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """Turns a round's total into what the next round, or the method, needs."""
        if round_ == 0:
            shares = self.shares(settings)
            wanted = [[round(share * int(row.sum())) for share in shares] for row in total]
            found = [[_descend(row, count) for count in counts] for row, counts in zip(total, wanted, strict=True)]
            return {
                "bins": [[bin_ for bin_, _ in row] for row in found],
                "left": [[left for _, left in row] for row in found],
                "wanted": wanted,
            }
        thresholds = []
        for rows, bins, left, wanted in zip(total, totals["bins"], totals["left"], totals["wanted"], strict=True):
            own = []
            for row, bin_, rank, count in zip(rows, bins, left, wanted, strict=True):
                low, _ = _descend(row, rank)
                bits = torch.tensor((bin_ << _LOW_BITS) | low, dtype=torch.int32)
                own.append(float(bits.view(torch.float32)) if count > 0 else float("inf"))
            thresholds.append(own)
        return {"thresholds": thresholds}


@dataclass(frozen=True)
class GlobalThreshold(MagnitudeRanks):
    """The same for the one share `keep`, over the whole model by default; "thresholds" is one number a task vector."""

    shares: Callable[[dict[str, Any]], Sequence[float]] = lambda settings: (settings["keep"],)

    def scope(self, settings: dict[str, Any]) -> Literal["model", "tensor"]:
        """As the method's setting of that name says; the whole model if it has none."""
        return "tensor" if settings.get("scope") == "tensor" else "model"

    def finish(self, total: Tensor, round_: int, totals: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """As in `MagnitudeRanks`, with the one threshold of each task vector taken out of its list."""
        found = super().finish(total, round_, totals, settings)
        return {"thresholds": [own[0] for own in found["thresholds"]]} if round_ else found


def _descend(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin that holds the count-th largest element, and its rank inside that bin (1 = the bin's largest)."""
    above = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(above, max(count, 1)))
    position = min(position, len(histogram) - 1)
    before = int(above[position - 1]) if position > 0 else 0
    return len(histogram) - 1 - position, max(count, 1) - before
