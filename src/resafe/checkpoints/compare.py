"""Whether two models have the same tensors, so that one can be subtracted from the other.

Reads headers only, but for vocabularies that may be stored twice.
"""

from __future__ import annotations

import re
from typing import Any
from weakref import WeakKeyDictionary

import torch

from resafe.checkpoints.adapter import check_adapter_fits
from resafe.checkpoints.header import TensorInfo
from resafe.checkpoints.reader import Checkpoint
from resafe.errors import InputError, listed

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|lm_head|wte|embed_in|embed_out|word_embeddings)\.weight$")

_HEADS = ("lm_head.weight", "embed_out.weight")


def is_vocabulary(name: str) -> bool:
    """Whether a tensor's name is that of an embedding or an output layer, which have a row (or an entry) a token."""
    return _EMBEDDING.search(name) is not None or name.endswith(("lm_head.bias", "embed_out.bias"))


def is_output_layer(name: str) -> bool:
    """Whether a tensor's name is that of an output layer, which a model may tie to its embedding."""
    return name.endswith(_HEADS)


def tied_copies(*checkpoints: Checkpoint) -> dict[str, str]:
    """Output layers that are stored beside the embedding that they equal, in all of the checkpoints: name → embedding.

    Such models are tied, and load as tied only while the two are equal. Reads both tensors, where both are stored and
    the configuration does not say that they are apart.
    """
    first = checkpoints[0]
    if any(checkpoint.config.get("tie_word_embeddings") is False for checkpoint in checkpoints):
        return {}
    vocabularies = [name for name in first.tensors if name.endswith(".weight") and is_vocabulary(name)]
    heads = [name for name in vocabularies if is_output_layer(name)]
    found = {}
    for head in heads:
        for embedding in (name for name in vocabularies if name not in heads):
            if all(_equal(checkpoint, head, embedding) for checkpoint in checkpoints):
                found[head] = embedding
    return found


_KNOWN: WeakKeyDictionary[Checkpoint, dict[tuple[str, str], bool]] = WeakKeyDictionary()


def _equal(checkpoint: Checkpoint, one: str, two: str) -> bool:
    """Whether two stored tensors are equal; vocabularies are large, so what was found is kept with the checkpoint."""
    infos = [checkpoint.tensors.get(name) for name in (one, two)]
    if None in infos or len({(info.shape, info.dtype) for info in infos if info is not None}) > 1:
        return False
    known = _KNOWN.setdefault(checkpoint, {})
    if (one, two) not in known:
        known[one, two] = torch.equal(checkpoint.read(one), checkpoint.read(two))
    return known[one, two]


def check_same_shapes(aligned: Checkpoint, tuned: Checkpoint) -> None:
    """Checks that a tuned model can be compared with an aligned one tensor by tensor; reports every problem at once.

    Two floating-point types of different width are no problem (the difference is taken in float32); a floating-point
    and an integer type are. An adapter is checked by its modules, against the aligned model itself.

    Raises:
        InputError: Tensors are missing, extra, or differ in shape or kind of dtype; up to ten problems are listed, with
            vocabularies named as such.
    """
    if aligned.kind != "model":
        raise InputError(
            f"{aligned.reference}: the aligned model is an adapter", "give a full model as the aligned one"
        )
    if tuned.kind == "adapter":
        check_adapter_fits(tuned, aligned)
        if tuned.base is None:
            return
        tuned = tuned.base
    missing = [name for name in aligned.tensors if name not in tuned.tensors]
    extra = [name for name in tuned.tensors if name not in aligned.tensors]
    problems = [f"{name}: missing in the tuned model{_tie_note(tuned)}" for name in missing]
    problems += [f"{name}: not in the aligned model{_tie_note(aligned)}" for name in extra]
    for name, info in aligned.tensors.items():
        other = tuned.tensors.get(name)
        if other is not None:
            problems += _differences(info, other, _vocabularies(aligned, tuned))
    if problems:
        raise InputError(
            f"{tuned.reference} does not have the tensors of {aligned.reference}:\n  {listed(problems)}",
            "the tuned model must come from the aligned one, with the same architecture and vocabulary",
        )


def vocabulary_note(info: TensorInfo, other: TensorInfo, first: Checkpoint, second: Checkpoint) -> str:
    """How two tensors of one name differ in shape, with vocabularies named as such."""
    return _differences(info, other, _vocabularies(first, second))[0]


def _differences(info: TensorInfo, other: TensorInfo, vocabularies: set[int]) -> list[str]:
    """Problems of one tensor that both models have."""
    if info.shape != other.shape:
        same_width = len(info.shape) == len(other.shape) == 2 and info.shape[1] == other.shape[1]
        if same_width and (_EMBEDDING.search(info.name) or {info.shape[0], other.shape[0]} <= vocabularies):
            return [f"vocabulary: {info.shape[0]} against {other.shape[0]} rows in {info.name}"]
        return [f"{info.name}: shape {info.shape} against {other.shape}"]
    if _kind(info.dtype) != _kind(other.dtype):
        return [f"{info.name}: dtype {_short(info.dtype)} against {_short(other.dtype)}"]
    return []


def _vocabularies(*checkpoints: Checkpoint) -> set[int]:
    """The vocabulary sizes that the configurations give, also inside a text_config."""
    found: set[int] = set()
    for checkpoint in checkpoints:
        nested: Any = checkpoint.config.get("text_config")
        for config in (checkpoint.config, nested if isinstance(nested, dict) else {}):
            if isinstance(config.get("vocab_size"), int):
                found.add(config["vocab_size"])
    return found


def _tie_note(lacking: Checkpoint) -> str:
    """A hint at tied embeddings, the usual reason for one tensor more or less."""
    tied = lacking.config.get("tie_word_embeddings")
    return " (its embeddings are tied: the output layer is not stored)" if tied else ""


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating" if dtype.is_floating_point else "bool" if dtype == torch.bool else "integer"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
