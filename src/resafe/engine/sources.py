"""Rows of tensors from files, as float32, without mapping a file: what is read is what memory is used for.

A tensor is seen as rows of its last dimension (a vector is one row). Knows files,
number formats and low-rank adapters; knows no method.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from resafe.checkpoints import (
    Blocks,
    Checkpoint,
    File,
    RemoteFile,
    TensorInfo,
    adapter_modules,
    base_tensor,
    check_additive,
)
from resafe.checkpoints.adapter import EXPERTS, over_experts
from resafe.checkpoints.compare import is_vocabulary
from resafe.deltas.lora import scaling
from resafe.errors import InputError

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FORMED = {"lora_A", "lora_B", "lora_magnitude_vector", "weight", "bias"}
"""What an adapter's tensors may be for its change to be formed row by row."""

_UNFORMED = ("use_bdlora", "layer_replication")
"""Settings with which factors of these names are something else."""

SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""Names of the scales that belong to an FP8 tensor, after the tensor's own name: stored value × scale is the weight."""


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, width) of a tensor: the last dimension is a row; a vector is one row, a scalar one of one element."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


class Files:
    """Open file descriptors, one a path, shared by all threads (positioned reads need no lock).

    Args:
        kept: Bytes that blocks of remote files may take in memory.
    """

    def __init__(self, kept: int = 64 << 20) -> None:
        self.blocks = Blocks(kept)
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, path: File, offset: int, buffer: memoryview, what: str) -> None:
        """Fills a buffer from a place in a file.

        Raises:
            InputError: The file cannot be read, or ends too early, or (a remote one) it changed.
            ResafeError: Object storage cannot be reached.
        """
        if isinstance(path, RemoteFile):
            self.blocks.read(path, offset, buffer)
            return
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(self._descriptor(path), [buffer[done:]], offset + done)
                if count == 0:
                    raise InputError(f"{path}: ends inside {what}", "the file was cut off since it was opened")
                done += count
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})", f"while reading {what}") from error

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            return self._open[path]

    def close(self) -> None:
        """Closes all."""
        self.blocks.close()
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory as bytes."""
    array: Any = tensor.view(torch.uint8).numpy().reshape(-1)
    return memoryview(array)


def read_rows(files: Files, info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a stored tensor in its stored dtype, shape (rows, width)."""
    _, width = rows_of(info.shape)
    found = torch.empty((stop - start, width), dtype=info.dtype)
    size = width * info.dtype.itemsize
    if found.numel():
        files.read(info.file, info.offset + start * size, bytes_of(found), f"tensor {info.name!r}")
    return found


class Source(Protocol):
    """A model of a fusion: what it changes, and how."""

    def changes(self, name: str) -> bool:
        """Whether the model holds another value of the tensor than the base."""
        ...

    def weight(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of θ_k, float32 (rows, width)."""
        ...

    def delta(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        """Rows of τ_k = θ_k − θ_base, float32 (rows, width).

        Args:
            name: The tensor.
            start: First row.
            stop: Row after the last.
            base: The same rows of the base, float32.
        """
        ...

    def nbytes(self, name: str) -> int:
        """Bytes that are read for the tensor."""
        ...


@dataclass(frozen=True)
class ModelSource:
    """A full model.

    Attributes:
        checkpoint: The model.
        files: Open files.
        names: Base name → name in this checkpoint, where the two differ (a tied head is stored as the embedding).
    """

    checkpoint: Checkpoint
    files: Files
    names: dict[str, str] = field(default_factory=dict)

    def changes(self, name: str) -> bool:
        """Always: equal values are found only by reading them."""
        return True

    def info(self, name: str) -> TensorInfo:
        """Header entry of a base name."""
        return self.checkpoint.tensors[self.names.get(name, name)]

    def weight(self, name: str, start: int, stop: int) -> Tensor:
        """See `Source`."""
        info = self.info(name)
        if info.name in self.checkpoint.unpickled:
            rows = self.checkpoint.read(info.name).reshape(rows_of(info.shape))[start:stop]
            return rows.to(torch.float32)
        rows = read_rows(self.files, info, start, stop)
        return self._scaled(info, rows, start, stop) if info.dtype in _FP8 else rows.to(torch.float32)

    def delta(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        """See `Source`."""
        return self.weight(name, start, stop).sub_(base)

    def nbytes(self, name: str) -> int:
        """See `Source`."""
        return self.info(name).nbytes

    def _scaled(self, info: TensorInfo, rows: Tensor, start: int, stop: int) -> Tensor:
        """FP8 values times their scales: one a tensor, one a row, or one a block of rows and columns."""
        value = rows.to(torch.float32)
        scale_info = next(
            (found for s in SCALE_SUFFIXES if (found := self.checkpoint.tensors.get(info.name + s)) is not None), None
        )
        if scale_info is None:
            return value
        scale = read_rows(self.files, scale_info, 0, rows_of(scale_info.shape)[0]).to(torch.float32)
        if scale.numel() == 1:
            return value.mul_(scale.reshape(()))
        total, width = rows_of(info.shape)
        scale = scale.reshape(scale_info.shape if len(scale_info.shape) > 1 else (-1, 1))
        down, across = -(-total // scale.shape[0]), -(-width // scale.shape[1])  # a block's rows and columns
        lines = torch.arange(start, stop).div(down, rounding_mode="floor")
        columns = torch.arange(width).div(across, rounding_mode="floor")
        return value.mul_(scale[lines][:, columns])


@dataclass(frozen=True)
class AdapterSource:
    """A LoRA adapter on the base: its change is formed from its factors, row by row.

    Plain LoRA, rsLoRA, rank and alpha patterns, DoRA, and modules that were trained whole.

    Attributes:
        checkpoint: The adapter.
        base: The model it sits on.
        files: Open files.
        change: Name and float32 value of a stored factor → what is used in its place; None leaves all as they are.
    """

    checkpoint: Checkpoint
    base: Checkpoint
    files: Files
    change: Callable[[str, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_additive(self.checkpoint)
        config, names = self.checkpoint.config, list(self.checkpoint.tensors)
        kind = str(config.get("peft_type", "LORA"))
        found = {role for module in adapter_modules(names).values() for role in module.parts} - _FORMED
        found |= {field for field in _UNFORMED if config.get(field)}
        if self._turned and any("lora_magnitude_vector" in name for name in names):
            found.add("DoRA of transposed weights (fan_in_fan_out)")
        if found or kind.upper() != "LORA":
            what = kind if kind.upper() != "LORA" else ", ".join(sorted(found))
            raise InputError(
                f"{self.checkpoint.reference}: {what} cannot be fused",
                "merge the adapter into its model (merge_and_unload of PEFT) and give the merged model",
            )
        tied = [name for name in self._parts if is_vocabulary(name)]
        if tied and self.base.config.get("tie_word_embeddings") and not config.get("ensure_weight_tying"):
            raise InputError(
                f"{self.checkpoint.reference} changes one of the embedding and the output layer, which its base has "
                f"tied: a fused {tied[0]} would be both",
                "tune both alike (ensure_weight_tying of PEFT), or untie the base first",
            )

    @cached_property
    def _parts(self) -> dict[str, dict[str, str]]:
        """Base tensor → role → name in the adapter."""
        shapes = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        found: dict[str, dict[str, str]] = {}
        for module in adapter_modules(list(shapes)).values():
            parts = dict(module.parts)
            low = {role: parts.pop(role) for role in list(parts) if role.startswith("lora_")}
            if low:
                up, down = shapes[low["lora_B"]], shapes[low["lora_A"]]
                wanted = (down[1], up[0]) if self._turned else (up[0], down[1])
                name = base_tensor(module.module, self.base, wanted)
                if name is None and over_experts(module.module):
                    raise InputError(
                        f"{self.checkpoint.reference}: '{module.module}' is all experts of a layer together", EXPERTS
                    )
                assert name is not None  # checked when the adapter was opened
                found[name] = low
            for leaf, stored in parts.items():
                name = base_tensor(module.module, self.base, shapes[stored], leaf)
                assert name is not None
                found[name] = {**found.get(name, {}), "whole": stored}  # PEFT saves what an adapter on a head sits on
        return found

    @property
    def _turned(self) -> bool:
        return bool(self.checkpoint.config.get("fan_in_fan_out"))

    @cached_property
    def _kept(self) -> dict[str, Tensor]:
        return {}

    def _factor(self, stored: str) -> Tensor:
        """A factor, float32: small, and needed again for every span of rows."""
        if stored not in self._kept:
            value = self.checkpoint.read(stored).to(torch.float32)
            self._kept[stored] = value if self.change is None else self.change(stored, value)
        return self._kept[stored]

    def changes(self, name: str) -> bool:
        """Whether the adapter touches the tensor."""
        return name in self._parts

    def weight(self, name: str, start: int, stop: int) -> Tensor:
        """See `Source`."""
        base = ModelSource(self.base, self.files).weight(name, start, stop)
        return base + self.delta(name, start, stop, base) if self.changes(name) else base

    def delta(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        """See `Source`; W' − W with W' = W + s B A, or for DoRA W' = m · (W + s B A) / ‖W + s B A‖ by row."""
        parts = self._parts.get(name)
        if parts is None:
            return torch.zeros_like(base)
        under = base
        if "whole" in parts:
            under = read_rows(self.files, self.checkpoint.tensors[parts["whole"]], start, stop).float()
            if "lora_A" not in parts:
                return under.sub_(base)
        up, down = self._factor(parts["lora_B"]), self._factor(parts["lora_A"])
        factor = scaling(self.checkpoint, name)
        update = (down.T[start:stop] @ up.T if self._turned else up[start:stop] @ down).mul_(factor)
        if "lora_magnitude_vector" not in parts:
            return update if under is base else update.add_(under).sub_(base)
        magnitude = self._factor(parts["lora_magnitude_vector"]).reshape(-1)[start:stop, None]
        tuned = under + update
        return tuned.mul_(magnitude / tuned.norm(dim=1, keepdim=True)).sub_(base)

    def nbytes(self, name: str) -> int:
        """See `Source`."""
        parts = self._parts.get(name, {})
        return sum(self.checkpoint.tensors[stored].nbytes for stored in parts.values())


def source_of(checkpoint: Checkpoint, base: Checkpoint, files: Files, names: dict[str, str]) -> Any:
    """The source for an opened checkpoint."""
    if checkpoint.kind == "adapter":
        return AdapterSource(checkpoint, base, files)
    return ModelSource(checkpoint, files, names)
