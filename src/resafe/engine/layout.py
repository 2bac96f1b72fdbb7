"""Where every byte of the output goes, known before a tensor is read: shards, headers, offsets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from resafe.checkpoints.header import DTYPES
from resafe.checkpoints.shards import WEIGHTS
from resafe.checkpoints.storage import File

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGN = 8  # the header is padded so that the data begin at a multiple of this


@dataclass(frozen=True)
class Placed:
    """One tensor of the output.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: Its stored dtype.
        fused: Whether some model changes it; otherwise the base's bytes are copied.
        offset: Where its data begin in its file, bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fused: bool
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Unit:
    """One unit of work: an output file.

    Attributes:
        number: Its place among the units.
        file: Its name in the output directory.
        header: The file's first bytes, up to the data.
        tensors: Its tensors in the order of their data.
    """

    number: int
    file: str
    header: bytes
    tensors: tuple[Placed, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def lay_out(tensors: Sequence[Placed], shard_bytes: int, kind: str = "model") -> list[Unit]:
    """Places tensors in files of at most `shard_bytes` of data, in their order; a larger tensor gets its own file."""
    groups: list[list[Placed]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return [_unit(number, len(groups), group, kind) for number, group in enumerate(groups)]


def lay_out_like(tensors: Sequence[Placed], files: Sequence[File]) -> list[Unit]:
    """Places tensors in as many files as they come from, each with those of one file; `files` has one a tensor."""
    groups: dict[File, list[Placed]] = {}
    for tensor, file in zip(tensors, files, strict=True):
        groups.setdefault(file, []).append(tensor)
    return [_unit(number, len(groups), group, "model") for number, group in enumerate(groups.values())]


def _unit(number: int, count: int, tensors: Sequence[Placed], kind: str) -> Unit:
    single = WEIGHTS["adapter" if kind == "adapter" else "model"]
    file = single if count == 1 else single.replace(".safetensors", f"-{number + 1:05d}-of-{count:05d}.safetensors")
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        end = place + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN)
    header = len(text).to_bytes(8, "little") + text
    placed, offset = [], len(header)
    for tensor in tensors:
        placed.append(Placed(tensor.name, tensor.shape, tensor.dtype, tensor.fused, offset))
        offset += tensor.nbytes
    return Unit(number, file, header, tuple(placed))


def index_of(units: Sequence[Unit]) -> dict[str, object]:
    """The content of `model.safetensors.index.json`."""
    total = sum(tensor.nbytes for unit in units for tensor in unit.tensors)
    placed = {tensor.name: unit.file for unit in units for tensor in unit.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
