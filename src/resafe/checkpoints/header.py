"""The header of a safetensors file, read and fully checked without touching a tensor.

Knows the file format: 8 bytes of length (little endian), that many bytes of JSON, then the data. Knows nothing of
models, shards or adapters. Everything a later read relies on is checked here, so that a damaged or hostile file is
refused with its name and the tensor's before any memory is mapped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from resafe.checkpoints.storage import File, RemoteFile
from resafe.errors import InputError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_MAX_ELEMENTS = 2**63 - 1
_HINT = "the file is damaged or incomplete: copy or download it again"

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor.

    Attributes:
        name: The tensor's name in the checkpoint.
        dtype: Its element type.
        shape: Its shape; () for a scalar.
        nbytes: Bytes it takes in the file.
        file: The file that holds it.
        offset: Where its data begins, in bytes from the start of the file; -1 in a pickled file, where that is unknown.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: File
    offset: int


def read_header(path: File) -> dict[str, TensorInfo]:
    """Reads and checks a safetensors header; of a remote file, no more than it and some 64 KiB are fetched.

    Returns:
        Tensors by name, in the order of their data in the file.

    Raises:
        InputError: The file cannot be read, is truncated, or its header is not consistent with itself and with the
            file's length; the message names the file and, where there is one, the tensor.
    """
    try:
        size = path.size if isinstance(path, RemoteFile) else path.stat().st_size
        with path.open("rb") as stream:
            declared = stream.read(_LENGTH_BYTES)
            if len(declared) < _LENGTH_BYTES:
                raise _damaged(path, f"it has {len(declared)} bytes, fewer than the {_LENGTH_BYTES} of a header length")
            length = int.from_bytes(declared, "little")
            if length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise _damaged(path, f"its header claims {length} bytes and the file has {size}")
            text = stream.read(length)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error})", "check the path and its permissions"
        ) from error
    entries = _parse(path, text)
    infos = [_tensor(path, name, entry, _LENGTH_BYTES + length) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(path, infos, _LENGTH_BYTES + length, size)
    return {info.name: info for info in infos}


def _damaged(path: File, what: str, tensor: str | None = None) -> InputError:
    where = f"{path}: " if tensor is None else f"{path}: tensor {tensor!r}: "
    return InputError(f"{where}{what}", _HINT)


def _parse(path: File, text: bytes) -> dict[str, Any]:
    """The header's entries without the metadata; every value still unchecked."""
    if not text.startswith(b"{"):
        raise _damaged(path, "this is not a safetensors file (its header does not begin with '{')")
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its header's __metadata__ is not a map of text to text")
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; a name given twice would let two readers see two different tensors."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        name.encode()  # a lone surrogate raises a ValueError here: such a name can be neither printed nor saved
        if name in found:
            raise ValueError(f"the name {name!r} appears twice")
        found[name] = value
    return found


def _tensor(path: File, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One checked entry; its place among the others is checked by `_check_layout`."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, "its entry does not have exactly dtype, shape and data_offsets", name)
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise InputError(
            f"{path}: tensor {name!r}: its dtype {dtype_name!r} is not known",
            f"known are {', '.join(DTYPES)}; convert the checkpoint to one of them",
        )
    if not _counts(shape):
        raise _damaged(path, f"its shape {shape!r} is not a list of lengths", name)
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"its data_offsets {offsets!r} are not a range of bytes", name)
    elements, nonzero = 1, 1
    for length in shape:
        elements, nonzero = elements * length, nonzero * (length or 1)
        if nonzero > _MAX_ELEMENTS:
            raise _damaged(path, f"its shape {shape!r} is larger than any memory", name)
    dtype = DTYPES[dtype_name]
    nbytes = elements * dtype.itemsize
    if nbytes != offsets[1] - offsets[0]:
        what = (
            f"its {dtype_name} shape {shape} needs {nbytes} bytes and its data_offsets hold {offsets[1] - offsets[0]}"
        )
        raise _damaged(path, what, name)
    return TensorInfo(name, dtype, tuple(shape), nbytes, path, data_start + offsets[0])


def _counts(value: Any) -> bool:
    """True for a list of integers that are not negative (bool is an int in Python, and no length)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_ELEMENTS for item in value)


def _check_layout(path: File, infos: list[TensorInfo], data_start: int, size: int) -> None:
    """The tensors must fill the data exactly: no overlap, no gap, nothing beyond the file and nothing left over."""
    end = data_start
    for info in infos:
        if info.offset + info.nbytes > size:
            missing = info.offset + info.nbytes - size
            raise _damaged(
                path, f"its data ends {missing} bytes beyond the file, which was cut off at {size}", info.name
            )
        if info.offset != end:
            kind = "overlaps the tensor before it" if info.offset < end else "leaves a gap after the tensor before it"
            raise _damaged(path, f"its data {kind} ({abs(info.offset - end)} bytes)", info.name)
        end += info.nbytes
    if end != size:
        raise _damaged(path, f"{size - end} bytes after its last tensor belong to none")
