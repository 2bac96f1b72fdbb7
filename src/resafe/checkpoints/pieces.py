"""Which stored tensors make up which parameter of a model: transformers renames and merges them as it loads.

Knows names, shapes and transformers' conversions; reads no file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """The tensors of a checkpoint that make up one parameter (or buffer) of a model.

    Attributes:
        groups: Their names. What is stacked is a group: the first projections of all experts, then the third ones.
        stacked: The new dimension along which each group is stacked; None where nothing is.
        joined: The dimension along which what comes of the groups is concatenated; None where nothing is.
    """

    groups: tuple[tuple[str, ...], ...]
    stacked: int | None = None
    joined: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All names, group by group."""
        return tuple(name for group in self.groups for name in group)

    @property
    def whole(self) -> bool:
        """Whether a stored tensor is the parameter as it is."""
        return self.stacked is None and self.joined is None

    def called(self, names: Mapping[str, str]) -> Pieces:
        """The same with other names for some of the tensors."""
        return replace(self, groups=tuple(tuple(names.get(name, name) for name in group) for group in self.groups))

    def merged(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """The parameter; gradients flow into its tensors, as they do not through transformers' own operations.

        Args:
            tensor: Name → tensor as it is stored.
        """
        if self.stacked is None:
            parts = [tensor(name) for name in self.names]
        else:
            parts = [torch.stack([tensor(name) for name in group], self.stacked) for group in self.groups]
        return parts[0] if self.joined is None else torch.cat(parts, self.joined)


def parameter_pieces(model: Any, stored: Mapping[str, tuple[int, ...]]) -> dict[str, Pieces]:
    """What each parameter (or buffer) of a model is made of, by the model's own name.

    transformers renames some tensors as it loads them, puts a model's prefix before names or takes it away, and merges
    others (the experts of a layer). Left out is what it splits, permutes or transposes, parameters of which `stored`
    has a part only, and what the model does not have.

    Args:
        model: A module of any kind; only models of transformers rename and merge.
        stored: Names in the checkpoint's files, and shapes.
    """
    held = model.state_dict()
    found = {name: Pieces(((name,),)) for name in stored if name in held}
    if len(found) == len(stored) or not hasattr(model, "base_model_prefix"):
        return found
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in stored:
        if name in found:
            continue
        own, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, held)
        if own in held and pattern is None:
            found.setdefault(own, Pieces(((name,),)))
        elif own in held and pattern is not None:
            collected[own][pattern].append(name)
    for own, names in collected.items():
        converter = by_pattern[next(iter(names))]
        there = [pattern for pattern in converter.source_patterns if pattern in names]
        pieces = _merging(converter, tuple(tuple(sorted(names[pattern], key=dot_natural_key)) for pattern in there))
        if pieces is not None and _fits(pieces, stored, held[own].shape):
            found.setdefault(own, pieces)
    return found


def _merging(converter: Any, groups: tuple[tuple[str, ...], ...]) -> Pieces | None:
    """What a converter does to tensors, in the order in which it takes them; None unless it only stacks and joins."""
    dims: list[int] = [getattr(operation, "dim", 0) for operation in converter.operations]
    match [type(operation).__name__ for operation in converter.operations]:
        case ["MergeModulelist"] if len(groups) == 1:
            return Pieces(groups, stacked=dims[0])
        case ["Concatenate"]:
            return Pieces(groups, joined=dims[0])
        case ["MergeModulelist", "Concatenate"]:
            return Pieces(groups, stacked=dims[0], joined=dims[1])
    return None


def _fits(pieces: Pieces, stored: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    """Whether all of the parameter is there."""
    try:
        return pieces.merged(lambda name: torch.empty(stored[name], device="meta")).shape == shape
    except RuntimeError:  # not as many of one as of the other
        return False
