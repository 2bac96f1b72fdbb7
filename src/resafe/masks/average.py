"""The mean of several masks over the same task vectors, e.g. of runs with other seeds or other objectives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from resafe.errors import InputError
from resafe.masks.concrete import MaskSettings
from resafe.masks.format import DESCRIPTION, WEIGHTS, Mask, load_masks
from resafe.provenance import digest_file, digest_value


def averaged(masks: Sequence[Mask], weights: Sequence[float] | None = None, names: Sequence[str] = ()) -> Mask:
    """The weighted mean Σ w_i m_i / Σ w_i, entry by entry, rounded to what the file holds.

    Args:
        masks: Masks of the same granularity and rescaling over the same tensors.
        weights: One a mask, none negative; None weighs all alike.
        names: What to call them in messages and in the mean's provenance.

    Raises:
        InputError: There are fewer than two, they do not fit together, or the weights do not fit.
    """
    called = list(names) or [f"mask {number}" for number in range(len(masks))]
    if len(masks) < 2:
        raise InputError(f"{len(masks)} mask to average", "give two or more")
    shares = [1.0] * len(masks) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(masks) or min(shares) < 0 or sum(shares) == 0:
        raise InputError(f"weights {shares} for {len(masks)} masks", "give each mask a weight of 0 or more, not all 0")
    first = masks[0]
    for mask, name in zip(masks[1:], called[1:], strict=True):
        _check_alike(first, called[0], mask, name)
    values: dict[str, Tensor] = {}
    for key in first.values:
        parts = [mask.values[key].double() * share for mask, share in zip(masks, shares, strict=True)]
        values[key] = sum(parts[1:], parts[0]) / sum(shares)
    tuned: list[Any] = [digest for mask in masks for digest in mask.provenance.get("tuned") or []]
    facts = {
        "averaged": called, "weights": shares, "aligned": first.provenance.get("aligned"),
        "tuned": list(dict.fromkeys(tuned)), "fusion": _fusion(masks), "copies": first.provenance.get("copies"),
    }  # fmt: skip
    kept = {name: fact for name, fact in facts.items() if fact is not None}
    settings = MaskSettings(first.settings.granularity, rescale=first.settings.rescale,
                            head_size=first.settings.head_size)  # fmt: skip
    return Mask.of(values, settings, kept, first.entries)


def _fusion(masks: Sequence[Mask]) -> Any:
    """The first one's, if all were learnt with that method and these settings: seeds may differ."""
    found = [mask.provenance.get("fusion") or {} for mask in masks]
    alike = all(
        (one.get("name"), one.get("settings")) == (found[0].get("name"), found[0].get("settings")) for one in found
    )
    return (found[0] or None) if alike else None


def _check_alike(first: Mask, name: str, other: Mask, other_name: str) -> None:
    def told(what: str, one: object, two: object) -> InputError:
        return InputError(
            f"{other_name}: {what} is {two}, that of {name} is {one}", "average masks over the same task vectors"
        )

    for field in ("granularity", "rescale", "head_size"):
        one, two = getattr(first.settings, field), getattr(other.settings, field)
        if one != two:
            raise told(field, one, two)
    if only := sorted(set(first.values) ^ set(other.values)):
        raise InputError(f"only one of {name} and {other_name} has values for '{only[0]}'", "they are of other models")
    for key, value in first.values.items():
        if value.shape != other.values[key].shape:
            raise told(f"the shape of {key}", tuple(value.shape), tuple(other.values[key].shape))
    one, two = (mask.provenance.get("aligned") for mask in (first, other))
    if one and two and one != two:
        raise InputError(f"{other_name} was learnt on another aligned model than {name}", "they cannot be averaged")


def average_directories(directories: Sequence[Path], weights: Sequence[float] | None = None) -> tuple[Mask, ...]:
    """The mean of masks on disk; where tuned models have masks of their own, the mean task by task.

    Raises:
        InputError: A mask is missing or damaged, or they do not fit together.
    """
    loaded = [load_masks(directory) for directory in directories]
    for masks, directory in zip(loaded, directories, strict=True):
        if len(masks) != len(loaded[0]):
            raise InputError(
                f"{directory} holds {len(masks)} masks, {directories[0]} {len(loaded[0])}",
                "average masks of as many tasks",
            )
    loaded = [
        _in_order(masks, loaded[0], directory, directories[0])
        for masks, directory in zip(loaded, directories, strict=True)
    ]
    names = [f"{directory} ({_digest(directory)[:12]})" for directory in directories]
    return tuple(averaged(masks, weights, names) for masks in zip(*loaded, strict=True))


def _in_order(masks: tuple[Mask, ...], first: tuple[Mask, ...], name: Path, first_name: Path) -> tuple[Mask, ...]:
    """Masks of their own in the order in which the first directory's were learnt on the tuned models."""
    own, wanted = (list(some[0].provenance.get("tuned") or []) for some in (masks, first))
    if len(masks) == 1 or not own or not wanted or own == wanted:
        return masks
    if sorted(own) != sorted(wanted) or len(own) != len(masks):
        raise InputError(
            f"{name} holds masks for other tuned models than {first_name}", "average masks over the same task vectors"
        )
    return tuple(masks[own.index(digest)] for digest in wanted)


def _digest(directory: Path) -> str:
    files = sorted(path for name in (WEIGHTS, DESCRIPTION) for path in directory.rglob(name))
    return digest_value([digest_file(path) for path in files])
