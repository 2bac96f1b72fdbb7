"""What a fusion is asked to do, as plain values. Knows no files and no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

OutputDtype = Literal["same", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Input:
    """One tuned model.

    Attributes:
        reference: A checkpoint reference: a path, `org/name`, `base+adapter`, `file.gguf`, `s3://…`, …
        name: Its name; keys its randomness, and stands in messages. "" takes the reference.
        weight: Its coefficient, as `Coefficients.of` reads it.
    """

    reference: str
    name: str = ""
    weight: Any = 1.0


@dataclass(frozen=True)
class Request:
    """A fusion.

    Attributes:
        base: The aligned model (or the base) that the task vectors are taken from.
        models: The tuned models.
        method: A registered fusion method.
        settings: Its settings.
        out: The directory to write, or an address in object storage.
        dtype: "same" keeps every tensor's dtype in the base.
        max_shard_size: Bytes of an output file at most, or a text such as "5GB"; None makes files as the base has them.
        seed: Seed of random methods.
        memory: Bytes that buffers may take, or a text.
        device: Where methods compute: "cpu", "cuda", or "auto" for a GPU where there is one. Files are read and written
            as before; a GPU pays for methods that compute much (TIES, DARE, singular vectors), not for sums.
        output: "model", or "adapter" where all models are adapters and the method is a weighted sum of them.
        rank: Rank of an adapter that is written, at most; None keeps the exact sum.
        vocabulary: "refuse" models with another vocabulary, or "extend" the base's by their added tokens, rows matched
            by token string.
        allow_pickle: Also read pickled weights, as plain tensors.
    """

    base: str
    models: tuple[Input, ...]
    out: Path | str
    method: str = "task_arithmetic"
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: OutputDtype = "same"
    max_shard_size: int | str | None = None
    seed: int = 0
    memory: int | str = "2GB"
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    output: Literal["model", "adapter"] = "model"
    rank: int | None = None
    vocabulary: Literal["refuse", "extend"] = "refuse"
    allow_pickle: bool = False

    @property
    def name(self) -> str:
        """The last part of the output's place."""
        return PurePosixPath(self.out).name
