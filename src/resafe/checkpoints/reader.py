"""The lazy checkpoint: what a model or adapter directory holds, known from its headers alone.

Opening reads headers and configuration; a tensor is read when asked for, and then as a memory map, or from object
storage by its range of bytes. Knows nothing of transformers' classes (that is `loading`) and computes nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from resafe.checkpoints.adapter import base_reference, check_adapter_fits
from resafe.checkpoints.cachedir import cache_root
from resafe.checkpoints.folder import Folder, remote_folder
from resafe.checkpoints.gguf import convert_gguf
from resafe.checkpoints.hashing import cached_digest, remembered_digest
from resafe.checkpoints.header import TensorInfo
from resafe.checkpoints.reference import Reference, parse_reference, resolve
from resafe.checkpoints.shards import WEIGHTS, Weights, has_weights, read_json, read_weights
from resafe.checkpoints.staging import ensure_space
from resafe.checkpoints.storage import File, RemoteFile
from resafe.errors import InputError
from resafe.provenance import digest_value

# Where a model came from is not part of what it is: the same files copied elsewhere must keep their digest.
_ORIGIN_FIELDS = (
    "_name_or_path",
    "_model_name_or_path",
    "base_model_name_or_path",
    "transformers_version",
    "peft_version",
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model or an adapter at rest. `tuned - aligned` is their task vector.

    Attributes:
        reference: As the user named it.
        path: The local directory; for a checkpoint in object storage, the copy of its small files.
        kind: "model" or "adapter".
        tensors: What each stored tensor is, by name; a tied tensor is stored, and listed, once.
        config: The content of config.json, or of adapter_config.json.
        base: The model an adapter sits on; None for a model, and for an adapter that names none.
        files: The weight files.
        cache: The directory that remembers digests.
        unpickled: The tensors that pickled files held, in memory; none of safetensors.
    """

    reference: str
    path: Path
    kind: Literal["model", "adapter"]
    tensors: Mapping[str, TensorInfo]
    config: dict[str, Any]
    base: Checkpoint | None
    files: tuple[File, ...]
    cache: Path
    unpickled: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in its stored dtype and shape: a private map of the file, never written back.

        From object storage it is a copy in memory.

        Raises:
            InputError: No such tensor, or the file changed since it was opened.
            ResafeError: Object storage cannot be reached.
        """
        info = self.tensors.get(name)
        if info is None:
            close = difflib.get_close_matches(name, self.tensors, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "tensors are named as in the checkpoint's files"
            raise InputError(f"{self.path}: has no tensor {name!r}", hint)
        if name in self.unpickled:
            return self.unpickled[name]
        if isinstance(info.file, RemoteFile):
            return _fetched(info, info.file)
        try:
            with safe_open(info.file, framework="pt", device="cpu") as handle:
                tensor: torch.Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{info.file}: tensor {name!r} cannot be read ({error})", "the file changed: open it again"
            ) from error
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            raise InputError(
                f"{info.file}: tensor {name!r} is no longer what it was when opened", "open the checkpoint again"
            )
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the weight files, the configuration and, for an adapter, its base: 64 hex digits.

        Fields of the configuration that only say where the model came from are left out. Hashing reads every byte once;
        the digests of the files are then remembered by path, size and modification time. For files in object storage
        their addresses, sizes and ETags stand instead of their digests: nothing is fetched to be hashed.
        """
        config = {name: value for name, value in self.config.items() if name not in _ORIGIN_FIELDS}
        files = [file.state if isinstance(file, RemoteFile) else self._hashed(file) for file in self.files]
        return digest_value({"files": files, "config": config, "base": self.base.digest if self.base else None})

    @property
    def remote(self) -> tuple[RemoteFile, ...]:
        """The weight files that lie in object storage."""
        return tuple(file for file in self.files if isinstance(file, RemoteFile))

    def downloaded(self) -> Path:
        """The local directory with all files in it; what lies in object storage is copied into the cache, once.

        Raises:
            InputError: There is no room, or a file changed since it was opened.
            ResafeError: Object storage cannot be reached.
        """
        missing = [file for file in self.remote if not (self.path / file.name).is_file()]
        if missing:
            ensure_space(self.path, sum(file.size for file in missing))
        for file in missing:
            file.download(self.path / file.name)
        return self.path

    def _hashed(self, file: Path) -> list[str]:
        return [file.name, cached_digest(file, self.cache)]

    def __sub__(self, other: Checkpoint) -> Any:
        """The task vector from `other` (aligned) to this checkpoint (tuned); nothing is computed yet."""
        from resafe.deltas import task_vector  # deltas read checkpoints: imported late, the arrow stays one-way

        return task_vector(self, other)


def known_digest(checkpoint: Checkpoint) -> str | None:
    """`Checkpoint.digest` where it is known without reading a weight; else None."""
    files = checkpoint.files + (checkpoint.base.files if checkpoint.base is not None else ())
    known = all(isinstance(f, RemoteFile) or remembered_digest(f, checkpoint.cache) is not None for f in files)
    return checkpoint.digest if known else None


def open_checkpoint(reference: str | Path, *, allow_pickle: bool = False, cache: Path | None = None) -> Checkpoint:
    """Opens a checkpoint lazily: reads and checks headers and configuration, no tensor.

    Args:
        reference: A local path, `org/name[@revision]`, `base+adapter`, `file.gguf`, `package:NAME/file.gguf`, or an
            address in object storage (`s3://…`, `gs://…`).
        allow_pickle: Also read `*.bin` weights, as plain tensors.
        cache: The cache directory; None is `$RESAFE_CACHE`, else `~/.cache/resafe`.

    Raises:
        InputError: Nothing there, a damaged file, or an adapter that does not fit its base.
        ResafeError: Object storage cannot be reached.
    """
    parsed = parse_reference(reference)
    root = cache_root(cache)
    if parsed.base is not None and parsed.adapter is not None:
        base = _open_directory(parsed.base, allow_pickle, root)
        adapter = _open_directory(parsed.adapter, allow_pickle, root)
        if adapter.kind != "adapter":
            raise InputError(
                f"{parsed.adapter.text}: is not an adapter, so it cannot stand after the '+'", "write base+adapter"
            )
        return _on_base(adapter, base, parsed.text)
    checkpoint = _open_directory(parsed, allow_pickle, root)
    named = base_reference(checkpoint.config, checkpoint.path) if checkpoint.kind == "adapter" else None
    if named is None:
        return checkpoint
    try:
        base = _open_directory(parse_reference(named), allow_pickle, root)
    except InputError as error:
        raise InputError(
            f"{checkpoint.path}: the adapter's base {named!r} cannot be opened: {error.message}",
            f"name the base yourself: BASE+{parsed.text}",
        ) from error
    return _on_base(checkpoint, base, parsed.text)


def _fetched(info: TensorInfo, file: RemoteFile) -> torch.Tensor:
    if not info.nbytes:
        return torch.empty(info.shape, dtype=info.dtype)
    data = bytearray(info.nbytes)
    with file.open() as stream:
        stream.seek(info.offset)
        stream.readinto(data)
    return torch.frombuffer(data, dtype=info.dtype).reshape(info.shape)


def _on_base(adapter: Checkpoint, base: Checkpoint, text: str) -> Checkpoint:
    if base.kind != "model":
        raise InputError(
            f"{base.path}: the base of adapter {adapter.path} is itself an adapter", "merge that one first"
        )
    check_adapter_fits(adapter, base)
    return Checkpoint(
        text,
        adapter.path,
        "adapter",
        adapter.tensors,
        adapter.config,
        base,
        adapter.files,
        adapter.cache,
        adapter.unpickled,
    )


def _open_directory(reference: Reference, allow_pickle: bool, cache: Path) -> Checkpoint:
    """Opens one half of a reference; an adapter's base is not looked for."""
    if reference.kind == "remote":
        folder = remote_folder(reference.target, cache)
    else:
        path = resolve(reference, allow_pickle=allow_pickle)
        folder = Folder(_directory_of_file(path, cache) if path.is_file() else path)
    is_model, is_adapter = has_weights(folder, "model"), has_weights(folder, "adapter")
    if is_model and is_adapter:
        raise InputError(f"{folder}: holds both a model and an adapter", "move one of them to a directory of its own")
    kind: Literal["model", "adapter"] = "adapter" if is_adapter or _is_bare_adapter(folder, is_model) else "model"
    config_name = "adapter_config.json" if kind == "adapter" else "config.json"
    weights: Weights = read_weights(folder, kind, allow_pickle=allow_pickle)
    if folder.url and folder.find(config_name) is None:
        raise InputError(f"{folder}: has no {config_name}", "this is not a complete checkpoint")
    config = read_json(folder.path / config_name)
    tensors = MappingProxyType(weights.tensors)
    return Checkpoint(reference.text, folder.path, kind, tensors, config, None, weights.files, cache, weights.loaded)


def _is_bare_adapter(folder: Folder, is_model: bool) -> bool:
    """An adapter_config.json without weights of any kind: the error should speak of the adapter's file."""
    return not is_model and folder.find("adapter_config.json") is not None


def _directory_of_file(path: Path, cache: Path) -> Path:
    """The directory a single file stands for: a converted GGUF, or the directory around plain safetensors."""
    if path.suffix == ".gguf":
        return convert_gguf(path, cache)
    if path.name in WEIGHTS.values() or path.name in {f"{name}.index.json" for name in WEIGHTS.values()}:
        return path.parent
    raise InputError(
        f"{path}: is not a checkpoint", "give the directory that holds config.json and the weights, or a .gguf file"
    )
