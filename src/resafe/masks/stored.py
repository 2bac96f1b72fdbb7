"""A mask file read in parts, for models that no memory holds: what `Mask.weight` gives, rows at a time.

Knows the file and the mask's granularities; knows no model and no fusion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resafe.checkpoints import TensorInfo, read_header
from resafe.errors import InputError
from resafe.masks.concrete import MaskSettings, Rescale, logits_key, logits_shape, oriented, scaled_mask
from resafe.masks.format import DESCRIPTION, WEIGHTS, read_description, readable, unpacked
from resafe.provenance import digest_file, digest_value

Shape = tuple[int, ...]
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class StoredMask:
    """A mask on disk.

    Attributes:
        directory: Where its two files are.
        settings: Granularity and rescaling.
        bits: 1 for a binary mask, 8 for a soft one.
        shapes: Key → shape of its values.
        places: Key → where its bytes are.
        provenance: As in `Mask`.
    """

    directory: Path
    settings: MaskSettings
    bits: int
    shapes: Mapping[str, Shape]
    places: Mapping[str, TensorInfo]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> StoredMask:
        """Reads the description and the header of a mask directory (or of one of its two files), no value.

        Raises:
            InputError: A file is missing or damaged, or of a later format.
        """
        directory = Path(path).expanduser()
        directory = directory.parent if directory.is_file() else directory
        with readable(directory):
            described = read_description(directory)
            if not (directory / WEIGHTS).is_file():
                raise FileNotFoundError(2, "no such file", str(directory / WEIGHTS))
            places = read_header(directory / WEIGHTS)
            shapes, bits = {key: tuple(shape) for key, shape in described["shapes"].items()}, described["bits"]
            for key, shape in shapes.items():
                _check_stored(places[key], bits, shape)
            return cls(directory, MaskSettings(**described["settings"]), bits, shapes, places, described["provenance"])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over both files."""
        return digest_value([digest_file(self.directory / file) for file in (DESCRIPTION, WEIGHTS)])

    @property
    def of_factors(self) -> bool:
        """Whether it lies over the factors A and B of adapters, and not over weights."""
        return any(".lora_" in key or ".lora." in key for key in self.shapes)

    def covers(self, name: str) -> bool:
        """Whether it has values for a tensor."""
        return self._key(name) in self.shapes

    def _key(self, name: str) -> str:
        """The key of a tensor's values; a stored copy of a tied tensor has those of the one that it copies."""
        copies: Mapping[str, str] = self.provenance.get("copies") or {}
        return logits_key(copies.get(name, name), self.settings.granularity)

    def problems(self, shapes: Mapping[str, Shape]) -> list[str]:
        """Why it is no mask over tensors of these names and shapes: values for other ones, or of another shape."""
        found, granularity = [], self.settings.granularity
        wanted: dict[str, Shape] = {}
        for name, shape in shapes.items():
            if self.covers(name):
                wanted[self._key(name)] = logits_shape(name, shape, self.settings)
        for key, have in self.shapes.items():
            if key not in wanted:
                found.append(f"it has values for {key}, which is not there")
            elif have != wanted[key]:
                found.append(f"its {granularity} values for {key} have shape {have}, {wanted[key]} is needed")
        return found

    def part(
        self,
        name: str,
        shape: Shape,
        rows: tuple[int, int],
        rescale: Rescale | None = None,
        strength: float | None = None,
    ) -> Tensor:
        """What rows [start, stop) of a task vector are multiplied with, broadcastable to (rows, width), float32.

        Args:
            name: The tensor.
            shape: Its whole shape; seen as rows of its last dimension, a vector as one row.
            rows: First row, and the one after the last.
            rescale: Division by the tensor's mean mask; None does what the file says. For "norm" the mask comes as it
                is: by how much it is scaled depends on the task vector (see `norm_kept`).
            strength: s of `scaled_mask`, without rescaling only; None leaves the mask as it is. 1 does so too, but for
                the last bit: realignment goes through the formula, so whoever wants its bits must.

        Raises:
            InputError: The mask does not cover the tensor, or the file changed since it was opened.
        """
        key, granularity = self._key(name), self.settings.granularity
        if key not in self.shapes:
            raise InputError(f"{self.directory}: no values for '{name}'", "it was learnt on other tensors")
        start, stop = rows
        width = shape[-1] if shape else 1
        count = math.prod(self.shapes[key])
        if granularity == "entry":
            value = self._values(key, start * width, stop * width).reshape(stop - start, width)
        elif granularity == "tensor":
            value = self._values(key, 0, 1).reshape(1, 1)
        elif granularity == "head":
            value = self._of_heads(name, key, shape, start, stop)
        elif granularity == "column" or len(shape) < 2 or (granularity == "rank" and ".lora_B." in name):
            value = self._values(key, 0, count).reshape(1, -1)
        else:  # a value for each index of the first dimension, each with as many rows as the others make
            owners = torch.arange(start, stop) // max(1, math.prod(shape[1:-1]))
            value = self._values(key, 0, count)[owners][:, None]
        if (rescale or self.settings.rescale) == "mean":
            return value / (self._mean(key) or 1.0)  # of a mask of zeros nothing is scaled up
        if strength is None or (rescale or self.settings.rescale) == "norm":
            return value
        return scaled_mask(value, strength)

    def _of_heads(self, name: str, key: str, shape: Shape, start: int, stop: int) -> Tensor:
        stored = self._values(key, 0, math.prod(self.shapes[key])).reshape(self.shapes[key])
        value = oriented(name, stored, self.settings)
        if len(shape) < 2:
            return value.reshape(1, -1)
        return value[start:stop] if len(value) > 1 else value

    def whole(self, name: str, shape: Shape, rescale: Rescale | None = None, strength: float | None = None) -> Tensor:
        """`part` of all rows, broadcastable to the tensor itself."""
        value = self.part(name, shape, (0, math.prod(shape[:-1])), rescale, strength)
        return value.expand(math.prod(shape[:-1]), shape[-1] if shape else 1).reshape(shape)

    def _values(self, key: str, start: int, stop: int) -> Tensor:
        """Entries [start, stop) of a key's values, float32 (stop − start,)."""
        info, per_byte = self.places[key], 8 // self.bits
        first, last = start // per_byte, -(-stop // per_byte)
        assert isinstance(info.file, Path)  # a mask lies on the disk
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(info.offset + first)
            data = stream.read(last - first)
        if len(data) < last - first:
            raise InputError(f"{info.file}: ends inside {key}", "the file was cut off since it was opened")
        packed = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        skipped = start - first * per_byte
        held = min((last - first) * per_byte, skipped + stop - start)
        return unpacked(packed, self.bits, (held,))[skipped:]

    @cached_property
    def _means(self) -> dict[str, Tensor]:
        return {}

    def _mean(self, key: str) -> Tensor:
        """The mean of a key's values; their stored integers are added up, so in what pieces makes no difference."""
        if key not in self._means:
            count, unit = math.prod(self.shapes[key]), 1 if self.bits == 1 else 255
            total = 0
            for start in range(0, count, _AT_ONCE):
                values = self._values(key, start, min(count, start + _AT_ONCE))
                total += int(values.mul_(unit).round_().sum(dtype=torch.float64))
            self._means[key] = torch.tensor(total / unit / max(1, count), dtype=torch.float32)
        return self._means[key]


def _check_stored(info: TensorInfo, bits: int, shape: Sequence[int]) -> None:
    count = math.prod(shape)
    if bits not in (1, 8) or info.dtype != torch.uint8 or info.nbytes != (-(-count // 8) if bits == 1 else count):
        raise ValueError(f"{info.nbytes} stored bytes do not hold {count} entries of {bits} bits")
