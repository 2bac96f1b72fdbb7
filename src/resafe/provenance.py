"""Digests of values and files, and what a result was made with. Knows nothing of models."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK = 1 << 22

LATER: Mapping[str, bool] = {"later": True}
"""Metadata of a settings' field that came after results were first digested and that does nothing at its default."""


def described(value: Any) -> Any:
    """`dataclasses.asdict`, but without `LATER` fields at their default: what was digested before keeps its digest."""
    if is_dataclass(value):
        return {
            field.name: described(getattr(value, field.name))
            for field in fields(value)
            if not (field.metadata.get("later") and getattr(value, field.name) == field.default)
        }
    if isinstance(value, Mapping):
        return {key: described(part) for key, part in value.items()}
    return [described(part) for part in value] if isinstance(value, list | tuple) else value


def digest_value(value: Any) -> str:
    """SHA-256 of a JSON-representable value in canonical form (sorted keys, no spaces), as 64 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits; reads in chunks of 4 MiB."""
    with path.open("rb") as stream:
        return digest_stream(stream)


def digest_stream(stream: BinaryIO) -> str:
    """SHA-256 of what is left of a stream, as 64 hex digits; reads in chunks of 4 MiB."""
    hasher = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        hasher.update(chunk)
    return hasher.hexdigest()


def digest_files(paths: list[Path], root: Path) -> str:
    """SHA-256 over the names (relative to `root`) and contents of several files, independent of their order."""
    return digest_value(sorted((path.relative_to(root).as_posix(), digest_file(path)) for path in paths))


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that decide numbers, for receipts and model cards."""
    found = {"python": platform.python_version()}
    for name in ("resafe", "torch", "transformers", "peft", "trl", "safetensors", "inspect-ai"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
