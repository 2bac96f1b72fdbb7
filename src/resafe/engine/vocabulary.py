"""Models with other vocabularies than the base's: rows of embeddings and output layers matched by token string.

The output has the base's vocabulary, and after it the added tokens that only tuned models have. Where a model lacks a
token its task vector is zero there; a token that the base lacks has no base row to be changed, so its row is the mean
of the rows of the models that have it, and every task vector is zero there.

Knows rows and sources; reads no tokenizer itself and knows no method.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resafe.checkpoints import Checkpoint, TensorInfo
from resafe.checkpoints.compare import is_vocabulary
from resafe.checkpoints.vocabulary import AddedToken, Vocabulary, extend_tokenizer, read_vocabulary
from resafe.checkpoints.writer import write_json
from resafe.engine.sources import ModelSource, Source
from resafe.errors import InputError

_NONE = -1
_MOST_PADDING = 512


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


def match_vocabularies(
    base: Checkpoint, models: Sequence[tuple[str, Checkpoint]], wanted: Mapping[str, TensorInfo]
) -> tuple[Extension | None, list[str], list[str]]:
    """Matches the models' tokens to the base's by their strings; reads tokenizers, no tensor.

    Args:
        base: The base.
        models: Names and checkpoints; adapters have the base's vocabulary.
        wanted: The base's tensors.

    Returns:
        The extension, or None where every model has the base's tokens in the base's places; problems; notes.
    """
    full = {number: model for number, (_, model) in enumerate(models) if model.kind == "model"}
    if not full:
        return None, [], []
    held = _vocabulary_size(base)
    if held is None:
        return None, [f"{base.reference}: which of its tensors hold the vocabulary cannot be told"], []
    try:
        own = read_vocabulary(base)
    except InputError as error:
        return None, [error.message], []
    problems, notes, found, sizes = [], [], dict[int, Vocabulary](), dict[int, int]()
    if max(own.ids.values()) >= held:
        problems.append(f"{base.reference}: its tokenizer has more tokens than its embedding rows ({held})")
    for number, model in full.items():
        name, size = models[number][0], _vocabulary_size(model)
        try:
            found[number], sizes[number] = read_vocabulary(model), size or held
        except InputError as error:
            if size != held:
                problems.append(f"{name}: {error.message}")
            else:
                notes.append(f"{name}: has no tokenizer of its own; its rows are taken for the base's tokens")
            continue
        wrong, remarks = _compare(name, own, found[number], sizes[number])
        problems += wrong
        notes += remarks
    same = all(v.ids == own.ids and sizes[k] == held for k, v in found.items())
    if problems or same:
        return None, problems, notes
    tensors = _vocabulary_tensors(list(full.values()), wanted, held)
    return _extension(own, found, sizes, len(models), wanted, tensors, held), [], notes


def _compare(name: str, own: Vocabulary, other: Vocabulary, size: int) -> tuple[list[str], list[str]]:
    """Why a model's tokens cannot be matched, and how many can."""
    fresh = [token for token in other.ids if token not in own.ids]
    beyond = [token for token in fresh if other.ids[token] >= size]
    problems = [f"{name}: its token {beyond[0]!r} has no row in its embedding"] if beyond else []
    wrong = own.differences(other)
    if wrong:
        problems.append(
            f"{name}: its tokenizer would cut text otherwise than the output's does: {'; '.join(wrong)}. Tune with the "
            "base's tokenizer and added tokens, or bring the model to the base's tokenizer first"
        )
    shared = len(own.ids.keys() & other.ids.keys())
    notes = [f"{name}: {shared} tokens shared with the base, {len(fresh)} new, {len(own.ids) - shared} missing"]
    odd = [t for t in other.ids if t in own.ids and other.added.get(t) != own.added.get(t)]
    if odd:
        notes.append(f"{name}: {len(odd)} tokens are cut out by other settings, e.g. {odd[0]!r}; the base's hold")
    return problems, notes


def _extension(
    own: Vocabulary, found: Mapping[int, Vocabulary], sizes: Mapping[int, int], count: int,
    wanted: Mapping[str, TensorInfo], tensors: frozenset[str], held: int,
) -> Extension:  # fmt: skip
    tokens: dict[str, AddedToken] = {}
    for number in sorted(found):
        ordered = sorted(found[number].ids.items(), key=lambda entry: entry[1])
        tokens |= {t: found[number].added[t] for t, _ in ordered if t not in own.ids and t not in tokens}
    ids = own.ids_with(list(tokens.values()))
    rows = _padded(max([held, *(id_ + 1 for id_ in ids)]), held, max(own.ids.values()) + 1)
    base = torch.arange(rows).clamp_(max=held - 1)  # padding, where the base has some, is like the base's last
    base[ids] = _NONE
    models = []
    for number in range(count):
        index = torch.full((rows,), _NONE)
        if number in found:
            places = found[number].ids
            pairs = [(i, places[t]) for t, i in own.ids.items() if t in places and places[t] < sizes[number]]
            at, stored = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
            index[at] = stored
        else:
            index[:held] = torch.arange(held)
            index[ids] = _NONE
        models.append(index)
    fresh = {
        id_: tuple((number, found[number].ids[token]) for number in sorted(found) if token in found[number].ids)
        for token, id_ in zip(tokens, ids, strict=True)
    }
    vectors = frozenset(name for name in tensors if len(wanted[name].shape) == 1)
    return Extension(tensors, vectors, base, tuple(models), fresh, tuple(tokens.values()), tuple(ids))


def _padded(needed: int, held: int, used: int) -> int:
    """Rows of the output: the base's if they are enough, else a multiple of what the base was padded to, if it was."""
    if needed <= held:
        return held
    multiple = 1
    while used < held and held % (2 * multiple) == 0 and multiple < _MOST_PADDING:
        multiple *= 2
    return -(-needed // multiple) * multiple


def _vocabulary_size(checkpoint: Checkpoint) -> int | None:
    """Rows of its embedding; where no tensor is named like one, what its configuration says."""
    for info in checkpoint.tensors.values():
        if is_vocabulary(info.name) and len(info.shape) == 2:
            return info.shape[0]
    nested = checkpoint.config.get("text_config")
    size = checkpoint.config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if isinstance(size, int) else None


def _vocabulary_tensors(models: Sequence[Checkpoint], wanted: Mapping[str, TensorInfo], held: int) -> frozenset[str]:
    """Tensors with a row a token: named like one, or as long as the vocabulary in the base and in every model."""
    found = set()
    for name, info in wanted.items():
        if not info.dtype.is_floating_point or len(info.shape) not in (1, 2) or info.shape[0] != held:
            continue
        others = [(model.tensors[name].shape, _vocabulary_size(model)) for model in models if name in model.tensors]
        fits = all(shape[:1] == (size,) and shape[1:] == info.shape[1:] for shape, size in others)
        if fits and (is_vocabulary(name) or any(shape != info.shape for shape, _ in others)):
            found.add(name)
    return frozenset(found)
