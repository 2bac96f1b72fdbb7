"""Which row of which model stands for a token: models' vocabularies matched to the base's by token string.

Knows tokens, names and shapes; reads tokenizers and no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from resafe.checkpoints import Checkpoint, TensorInfo
from resafe.checkpoints.compare import is_vocabulary
from resafe.checkpoints.vocabulary import AddedToken, Vocabulary, read_vocabulary, stored_ids
from resafe.engine.vocabulary import Extension
from resafe.errors import InputError

_NONE = -1
_MOST_PADDING = 512


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
    extension = _extension(own, found, sizes, len(models), wanted, tensors, held)
    shared = sum(len(owners) > 1 for owners in extension.fresh.values())
    notes.append(
        f"the output has {extension.rows} rows of vocabulary: the base's {len(own.ids)} tokens and "
        f"{len(extension.tokens)} new ones, {shared} of them means over several models"
    )
    return extension, [], notes


def check_rows(base: Checkpoint, models: Sequence[tuple[str, Checkpoint]]) -> tuple[list[str], list[str]]:
    """Whether rows that are fused in their places stand for the same tokens in the base and in every full model.

    Args:
        base: The base.
        models: Names and checkpoints; adapters have the base's vocabulary.

    Returns:
        Problems: models with other tokens under the base's ids. Notes: models with tokens under ids that the base
        leaves unused, and those whose tokenizer has no `tokenizer.json`, which are taken to have the base's.
    """
    differing = [(name, model) for name, model in models if model.kind == "model" and not _same_tokenizer(base, model)]
    own = stored_ids(base) if differing else None  # parsing takes a while, and most models have the base's file
    if own is None:
        return [], []
    problems, notes = [], []
    for name, model in differing:
        other = stored_ids(model)
        if other is None:
            notes.append(f"{name}: has no tokenizer.json; its rows are taken for the base's tokens")
            continue
        unlike = sorted(number for number in own.keys() & other.keys() if own[number] != other[number])
        fresh = sorted(other.keys() - own.keys())
        if unlike:
            first = unlike[0]
            problems.append(
                f"{name}: vocabulary: {len(unlike)} rows stand for other tokens than in the base, e.g. row {first} for "
                f"{other[first]!r}, in the base for {own[first]!r}"
            )
        elif fresh:
            notes.append(
                f"{name}: {len(fresh)} tokens that the base lacks, e.g. {other[fresh[0]]!r}, are in its spare rows: "
                "fused, but not in the output's tokenizer; vocabulary: extend takes them over"
            )
    return problems, notes


def _same_tokenizer(first: Checkpoint, second: Checkpoint) -> bool:
    files = [checkpoint.path / "tokenizer.json" for checkpoint in (first, second)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()


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
