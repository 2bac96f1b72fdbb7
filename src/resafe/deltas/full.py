"""Differences of tensors of the same name and shape: two full models, or two adapters factor by factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from resafe.checkpoints import Checkpoint, check_same_shapes, rewriting_start, tied_copies
from resafe.deltas.fresh import FreshAdapter
from resafe.deltas.lora import factor_modules, is_plain
from resafe.errors import InputError


@dataclass(frozen=True)
class DifferenceVector:
    """τ = tuned − aligned for every tensor, by name; with no aligned adapter, minus one that changes nothing.

    In adapter space the factors A and B are differenced apart, as METHODS §1 has it for an adapter that continues
    a safe one. An adapter trained on top of an aligned model has τ = (A, B): there the aligned factors are zero, and
    what is no factor is what the base makes of it (see `FreshAdapter`).

    Attributes:
        tuned: The tuned checkpoint.
        base: The aligned checkpoint of the same kind, or None where the aligned adapter changes nothing.

    Raises:
        InputError: The two do not belong together, or there is no aligned adapter, and what a tensor of the tuned one
            would be in it is not known.
    """

    tuned: Checkpoint
    base: Checkpoint | None

    def __post_init__(self) -> None:
        if self.base is None:
            FreshAdapter(self.tuned)  # refuses what it does not know
            return
        if self.tuned.kind == "model":
            check_same_shapes(self.base, self.tuned)
        else:
            _check_same_factors(self.base, self.tuned)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tuned checkpoint's tensors without copies, sorted."""
        return tuple(sorted(name for name in self.tuned.tensors if name not in self.copies))

    @cached_property
    def copies(self) -> Mapping[str, str]:
        """Stored copies of a tied tensor, by the name under which the vector covers it.

        Of models see `tied_copies`. Of an adapter they are an output layer's tensors that PEFT has tied to those of the
        embedding's adapter; factors are then each other's transposes.
        """
        if self.tuned.kind == "model":
            return {} if self.base is None else tied_copies(self.base, self.tuned)
        return _tied_in_adapter(self.tuned)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.tuned.tensors[name].shape

    def aligned(self, name: str) -> Tensor:
        """The aligned tensor, float32."""
        if self.base is None:
            return self._fresh.tensor(name)
        return self.base.read(name).to(torch.float32)

    def delta(self, name: str) -> Tensor:
        """The difference tuned − aligned, float32."""
        return self.tuned.read(name).to(torch.float32) - self.aligned(name)

    @cached_property
    def _fresh(self) -> FreshAdapter:
        return FreshAdapter(self.tuned)

    @property
    def adapter(self) -> Checkpoint | None:
        """The tuned adapter; None between models."""
        return self.tuned if self.tuned.kind == "adapter" else None

    def factor_modules(self) -> dict[str, tuple[str, str, float]] | None:
        """For adapters that are LoRA's factors and nothing else: module → (name of A, name of B, scaling s)."""
        adapter = self.adapter
        return factor_modules(adapter) if adapter is not None and is_plain(adapter) else None


def _tied_in_adapter(adapter: Checkpoint) -> dict[str, str]:
    config = adapter.config
    if not config.get("ensure_weight_tying") and str(config.get("peft_type")).upper() != "TRAINABLE_TOKENS":
        return {}
    heads, found = [name for name in adapter.tensors if ".lm_head." in name], dict[str, str]()
    others = [name for name in adapter.tensors if ".layers." not in name and name not in heads]
    for head in heads:
        value = adapter.read(head)
        for other in others:
            same = adapter.read(other)
            if torch.equal(same, value) or (same.dim() == 2 and torch.equal(same.T, value)):
                found[head] = other
    return found


_MEANT = (
    "r", "use_rslora", "rank_pattern", "alpha_pattern", "layer_replication", "use_bdlora", "scaling", "coft", "eps",
    "use_cayley_neumann", "topk", "apply_GS", "sparse", "very_sparse", "wavelet_family", "token_indices",
    "trainable_token_indices",
)  # fmt: skip
_MEANT_ENDINGS = ("alpha", "_seed", "_key")


def different_settings(one: Checkpoint, two: Checkpoint) -> list[str]:
    """Fields of two adapters' configurations that give the same tensors another meaning, where they differ, sorted.

    Scales, the seeds of what is drawn as an adapter is made (VeRA's projections, FourierFT's places), trained tokens.
    """
    fields = {field for field in {*one.config, *two.config} if field in _MEANT or field.endswith(_MEANT_ENDINGS)}
    return sorted(field for field in fields if (one.config.get(field) or None) != (two.config.get(field) or None))


def _check_same_factors(aligned: Checkpoint, tuned: Checkpoint) -> None:
    """Two adapters can be differenced factor by factor only if the tuned one continued the aligned one."""
    problems = [f"{name} is only in one of them" for name in sorted(set(aligned.tensors) ^ set(tuned.tensors))]
    for name in sorted(set(aligned.tensors) & set(tuned.tensors)):
        shapes = tuple(aligned.tensors[name].shape), tuple(tuned.tensors[name].shape)
        if shapes[0] != shapes[1]:
            problems.append(f"{name} has shape {shapes[0]} in the aligned and {shapes[1]} in the tuned adapter")
    problems += [
        f"{field} is {aligned.config.get(field)} in the aligned and {tuned.config.get(field)} in the tuned"
        for field in different_settings(aligned, tuned)
    ]
    starts = [rewriting_start(one.config) for one in (aligned, tuned)]
    if starts[0] != starts[1]:
        problems.append(f"init_lora_weights is {starts[0]} in the aligned and {starts[1]} in the tuned")
    if problems:
        raise InputError(
            f"{tuned.reference} does not continue the adapter {aligned.reference}:\n  " + "\n  ".join(problems[:10]),
            "tune by continuing the aligned adapter, or compare the weights instead (space: weights)",
        )
