"""Rows of embeddings and output layers in a vocabulary that is not their model's own.

The output has the base's vocabulary, and after it the added tokens that only tuned models have. Where a model lacks a
token its task vector is zero there; a token that the base lacks has no base row to be changed, so its row is the mean
of the rows of the models that have it, and every task vector is zero there.

Knows rows and sources; which row is which token is `matching`'s business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resafe.checkpoints import TensorInfo
from resafe.checkpoints.vocabulary import AddedToken, extend_tokenizer
from resafe.checkpoints.writer import write_json
from resafe.engine.sources import ModelSource, Source


@dataclass(frozen=True, eq=False)
class Extension:
    """Which row of which model every row of the output's vocabulary comes from.

    Attributes:
        tensors: Names, in the base, of the tensors whose first dimension is the vocabulary.
        vectors: Those of them that have one dimension.
        base: Row of the base for each output row, int64 (rows,); −1 for a new token.
        models: The same for each model; −1 where it has no row for the token.
        fresh: Output row of a new token → (number of a model, its row) for all models that have it.
        tokens: The new tokens.
        ids: Their ids, which are their output rows.
    """

    tensors: frozenset[str]
    vectors: frozenset[str]
    base: Tensor
    models: tuple[Tensor, ...]
    fresh: Mapping[int, tuple[tuple[int, int], ...]]
    tokens: tuple[AddedToken, ...]
    ids: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the output."""
        return len(self.base)

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the output's rows."""
        hasher = hashlib.sha256(
            repr((sorted(self.tensors), self.tokens, self.ids, sorted(self.fresh.items()))).encode()
        )
        for index in (self.base, *self.models):
            hasher.update(index.numpy().tobytes())
        return hasher.hexdigest()

    def reshaped(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The base's tensors in the shapes that the output has."""
        return {
            name: replace(info, shape=(self.rows, *info.shape[1:])) if name in self.tensors else info
            for name, info in infos.items()
        }

    def extent(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """The output rows that a span of a tensor means: its own, or all for a vector, which is one span."""
        return (0, self.rows) if name in self.vectors else (start, stop)

    def keep_new(self, name: str, start: int, stop: int, value: Tensor, base: Tensor) -> None:
        """Puts the base's rows of new tokens into fused ones, in place.

        Methods over whole weights (spherical ones) scale a row that all models share; a new token's is to stay.
        """
        if name in self.tensors:
            first, last = self.extent(name, start, stop)
            fresh = self.base[first:last] < 0
            value.reshape(last - first, -1)[fresh] = base.reshape(last - first, -1)[fresh]

    def take(self, source: Source, name: str, index: Tensor) -> Tensor:
        """Rows of a source's tensor by their numbers, (len(index), width); one entry each of a vector."""
        if name in self.vectors:
            return source.weight(name, 0, 1).reshape(-1, 1)[index]
        return gathered(source, name, index)

    def write(self, directory: Path) -> None:
        """Makes the base's configuration and tokenizer in a directory those of the output."""
        path = directory / "config.json"
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        nested = config.get("text_config")
        for part in (config, nested if isinstance(nested, dict) else {}):
            if "vocab_size" in part or (part is config and not isinstance(nested, dict)):
                part["vocab_size"] = self.rows
        write_json(path, config)
        if self.tokens:
            extend_tokenizer(directory, self.tokens, self.ids)


@dataclass(frozen=True)
class ExtendedBase:
    """The base's rows in the output's vocabulary.

    Attributes:
        inner: The base.
        extension: The rows.
        models: The models' own sources, for the rows of new tokens.
    """

    inner: ModelSource
    extension: Extension
    models: tuple[Source, ...]

    def weight(self, name: str, start: int, stop: int) -> Tensor:
        """See `Source`; for a new token the mean row of the models that have it."""
        known = self.extension
        if name not in known.tensors:
            return self.inner.weight(name, start, stop)
        first, last = known.extent(name, start, stop)
        index = known.base[first:last]
        has = index >= 0
        value = torch.empty((last - first, 1 if name in known.vectors else self.inner.info(name).shape[-1]))
        if has.any():
            value[has] = known.take(self.inner, name, index[has])
        for row in (~has).nonzero().flatten().tolist():
            owners = [
                known.take(self.models[number], name, torch.tensor([place]))
                for number, place in known.fresh[first + row]
            ]
            value[row] = torch.cat(owners).mean(0)
        return value.reshape(1, -1) if name in known.vectors else value


@dataclass(frozen=True)
class ExtendedModel:
    """A model's rows in the output's vocabulary; the base's where it has none.

    Attributes:
        inner: The model.
        base: The base.
        number: The model's place among the models.
    """

    inner: Source
    base: ExtendedBase
    number: int

    def changes(self, name: str) -> bool:
        """See `Source`."""
        return self.inner.changes(name)

    def weight(self, name: str, start: int, stop: int) -> Tensor:
        """See `Source`."""
        if name not in self.base.extension.tensors:
            return self.inner.weight(name, start, stop)
        return self._onto(name, start, stop, self.base.weight(name, start, stop))

    def delta(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        """See `Source`; zero for the tokens that the model, or the base, lacks."""
        if name not in self.base.extension.tensors:
            return self.inner.delta(name, start, stop, base)
        return self._onto(name, start, stop, base.clone()).sub_(base)

    def nbytes(self, name: str) -> int:
        """See `Source`."""
        return self.inner.nbytes(name)

    def _onto(self, name: str, start: int, stop: int, value: Tensor) -> Tensor:
        """Puts the model's rows in their places."""
        known = self.base.extension
        first, last = known.extent(name, start, stop)
        index = known.models[self.number][first:last]
        has = index >= 0
        if has.any() and self.inner.changes(name):
            rows = value.reshape(last - first, -1)
            rows[has] = known.take(self.inner, name, index[has])
        return value


def gathered(source: Source, name: str, index: Tensor) -> Tensor:
    """Rows of a tensor by their numbers, (len(index), width): what lies close together is read at once.

    Args:
        source: Where they are read.
        name: The tensor.
        index: Their numbers, int64, at least one, none negative.
    """
    low, high = int(index.min()), int(index.max()) + 1
    if high - low <= 2 * len(index):  # in order, or nearly: reading a few rows too many costs less than another read
        block = source.weight(name, low, high)
        return block if torch.equal(index, torch.arange(low, high)) else block[index - low]
    return torch.cat([source.weight(name, start, stop) for start, stop in _runs(index)])


def _runs(index: Tensor) -> Iterator[tuple[int, int]]:
    """The index as ranges of consecutive numbers, in its order."""
    ends = ((index[1:] - index[:-1]) != 1).nonzero().flatten() + 1
    bounds = [0, *ends.tolist(), len(index)]
    for left, right in pairwise(bounds):
        yield int(index[left]), int(index[right - 1]) + 1
