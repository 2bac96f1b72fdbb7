"""Which files of a directory hold its weights, and the tensors they hold together.

Knows the naming of single files, shards and index files. Knows nothing of configurations, adapters' maths or downloads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from resafe.checkpoints.folder import Folder
from resafe.checkpoints.header import TensorInfo, read_header
from resafe.checkpoints.pickled import load_pickle, refuse_pickle
from resafe.checkpoints.storage import File, RemoteFile
from resafe.errors import InputError

WEIGHTS = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}
_PICKLES = {"model": "pytorch_model.bin", "adapter": "adapter_model.bin"}
_NAMED_AT_MOST = 10


@dataclass(frozen=True)
class Weights:
    """The weights of one directory.

    Attributes:
        tensors: All tensors by name, in the order of their files and of their data in them.
        files: The files that hold them.
        loaded: The tensors themselves where they had to be unpickled; empty for safetensors.
    """

    tensors: dict[str, TensorInfo]
    files: tuple[File, ...]
    loaded: Mapping[str, torch.Tensor] = field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: The file is missing, unreadable, or not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error})", "this directory is not a complete checkpoint"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON ({error})", "copy or download the file again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: is not a JSON object", "copy or download the file again")
    return found


def read_weights(folder: Folder, kind: Literal["model", "adapter"], *, allow_pickle: bool) -> Weights:
    """Finds and checks the weights of a model or an adapter: one file, or shards with an index.

    Raises:
        InputError: No weights, missing shards, an index that does not fit its shards, or only pickles and they are not
            allowed.
    """
    name, index = WEIGHTS[kind], f"{WEIGHTS[kind]}.index.json"
    single = folder.find(name)
    if single is not None:
        return Weights(_not_empty(read_header(single), single), (single,))
    if folder.find(index) is not None:
        return _sharded(folder, index, ".safetensors")
    pickled = folder.find(_PICKLES[kind])
    pickled_index = folder.find(f"{_PICKLES[kind]}.index.json")
    for found in (pickled, pickled_index):
        if found is not None and not allow_pickle:
            raise refuse_pickle(found)
    if pickled is not None:
        infos, loaded = load_pickle(_on_disk(pickled))
        return Weights(_not_empty(infos, pickled), (pickled,), loaded)
    if pickled_index is not None:
        return _sharded(folder, pickled_index.name, ".bin")
    raise InputError(f"{folder}: has no {name} and no {index}{_others(folder)}", _missing_hint(folder))


def has_weights(folder: Folder, kind: Literal["model", "adapter"]) -> bool:
    """True if the directory holds weights of that kind in any form, readable or not."""
    names = (WEIGHTS[kind], _PICKLES[kind])
    return any(folder.find(name) or folder.find(f"{name}.index.json") for name in names)


def _sharded(folder: Folder, named: str, suffix: str) -> Weights:
    """The tensors of all shards that the index of this name names, each found where the index says."""
    index = folder.path / named
    placed = _weight_map(index, suffix)
    wanted = {name: folder.find(name) for name in sorted(set(placed.values()))}
    absent = [name for name, file in wanted.items() if file is None]
    if absent:
        raise InputError(
            f"{folder}: {len(absent)} of {len(wanted)} shards are missing: {_some(absent)}",
            "download the missing files",
        )
    files = [file for file in wanted.values() if file is not None]
    tensors: dict[str, TensorInfo] = {}
    loaded: dict[str, torch.Tensor] = {}
    for path in files:
        infos, values = (read_header(path), {}) if suffix == ".safetensors" else load_pickle(_on_disk(path))
        expected = {name for name, file in placed.items() if file == path.name}
        lacking, unnamed = sorted(expected - set(infos)), sorted(set(infos) - expected)
        if lacking:
            raise InputError(
                f"{path}: {index.name} says it holds {_some(lacking)}, and it does not", "download the files again"
            )
        if unnamed:
            raise InputError(
                f"{path}: holds {_some(unnamed)}, which {index.name} does not place there",
                "index and shard are of two checkpoints",
            )
        tensors |= infos
        loaded |= values
    return Weights(tensors, tuple(files), loaded)


def _weight_map(index: Path, suffix: str) -> dict[str, str]:
    """The index's map from tensor to file, every file a plain name inside the directory."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise InputError(f"{index}: has no weight_map", "the index is damaged: download it again")
    for tensor, name in placed.items():
        # Only a plain name: an index from elsewhere must not make us read files outside the checkpoint.
        plain = (
            isinstance(name, str)
            and not set(name) & set("/\\:\0")
            and name not in (".", "..")
            and name.endswith(suffix)
        )
        if not plain:
            raise InputError(
                f"{index}: tensor {tensor!r} is placed in {name!r}, not a plain {suffix} file name",
                "do not use this checkpoint",
            )
    return placed


def _on_disk(file: File) -> Path:
    if isinstance(file, RemoteFile):
        raise InputError(f"{file}: pickled weights are not read from object storage", "copy them to a local directory")
    return file


def _not_empty(infos: dict[str, TensorInfo], path: File) -> dict[str, TensorInfo]:
    if not infos:
        raise InputError(f"{path}: holds no tensors", "the file is empty: save the checkpoint again")
    return infos


def _others(folder: Folder) -> str:
    """The weight files of other names that are there, as an addition to an error message, or nothing."""
    found = [name for name in folder.names() if name.endswith((".safetensors", ".gguf", ".bin", ".pth"))]
    return f", only {_some(found)}" if found else ""


def _missing_hint(folder: Folder) -> str:
    suffixes = {name.rpartition(".")[2] for name in folder.names()}
    if "gguf" in suffixes:
        local = "name the GGUF file itself: directory/file.gguf"
        return "copy the GGUF file to the disk and give its path" if folder.url else local
    if "safetensors" in suffixes:
        return "shards need their index file: download it too"
    return "give a directory saved by save_pretrained, with its weights as safetensors"


def _some(names: list[str]) -> str:
    """Up to ten names, and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
