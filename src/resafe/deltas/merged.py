"""Adapters of any kind as changes of the weights: of the model that PEFT makes of them by merging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from resafe.checkpoints import (
    Checkpoint,
    base_tensor,
    check_layers,
    load_model,
    open_checkpoint,
    save_model,
    tied_copies,
)
from resafe.errors import InputError
from resafe.provenance import digest_value, versions

_LIBRARIES = ("peft", "torch", "transformers")
_FORMAT = 1  # raised when the same adapter gives other files


def merged_model(adapter: Checkpoint) -> Checkpoint:
    """The model with an adapter merged into it by PEFT, float32; kept in the cache by the digest of adapter and base.

    Raises:
        InputError: PEFT cannot merge the adapter, or no file of its base's tensors could hold the model.
    """
    check_layers(adapter)
    made_with = {name: version for name, version in versions().items() if name in _LIBRARIES}
    folder = adapter.cache / "merged" / digest_value([_FORMAT, adapter.digest, made_with])[:24]
    if not (folder / "config.json").is_file():  # the directory appears whole, by one rename
        model = load_model(adapter, dtype="float32")
        _check_ties(model, adapter)
        card = f"# {adapter.reference}\n\nMerged by resafe, which can make it again.\n"
        save_model(folder, model, adapter, card, keep_existing=True)  # type: ignore[arg-type]  # others may read it
    return open_checkpoint(folder, cache=adapter.cache)


def _check_ties(model: Any, adapter: Checkpoint) -> None:
    """A tied model is saved without its output layer: what an adapter made of that alone would be lost."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    if tied and head is not None and not torch.equal(embedding.weight, head.weight):
        raise InputError(
            f"{adapter.reference} changes one of the embedding and the output layer, which its base has tied: the "
            "merged model's files could hold one of them only",
            "take the adapter's own tensors (space: factors), or tune both alike (ensure_weight_tying of PEFT)",
        )


@dataclass(frozen=True)
class MergedVector:
    """τ of the weights between models that adapters make, of whatever kind: merged(tuned) − merged(aligned).

    Attributes:
        tuned: The tuned adapter.
        safe: The aligned adapter on the same base, or None.
        model: The base model's checkpoint, by whose files the weights are named.

    Raises:
        InputError: See `merged_model`; it is merged when something is first asked for.
    """

    tuned: Checkpoint
    safe: Checkpoint | None
    model: Checkpoint

    @property
    def adapter(self) -> None:
        """None: it is over the weights."""
        return None

    def factor_modules(self) -> None:
        """None: it is over the weights."""
        return None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names, as in the base's files, of all its weights without copies, sorted.

        Without what transformers leaves aside as it loads the model, too: masks of attention, frequencies.
        """
        return tuple(sorted(self._new[1]))

    @cached_property
    def copies(self) -> Mapping[str, str]:
        """Output layers that the base stores beside the embedding that they are tied to: name → embedding."""
        new = self._new[1]
        return {copy: name for copy, name in tied_copies(self.model).items() if copy not in new and name in new}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one weight."""
        return self.model.tensors[name].shape

    def aligned(self, name: str) -> Tensor:
        """The base's weight with the aligned adapter merged into it, float32."""
        if self._old is None:
            return self.model.read(name).to(torch.float32)
        merged, stored = self._old
        return merged.read(stored[name]).to(torch.float32)

    def delta(self, name: str) -> Tensor:
        """The change of the weight from aligned to tuned, float32."""
        merged, stored = self._new
        return merged.read(stored[name]).to(torch.float32) - self.aligned(name)

    @cached_property
    def _new(self) -> tuple[Checkpoint, Mapping[str, str]]:
        return self._merged(self.tuned)

    @cached_property
    def _old(self) -> tuple[Checkpoint, Mapping[str, str]] | None:
        return None if self.safe is None else self._merged(self.safe)

    def _merged(self, adapter: Checkpoint) -> tuple[Checkpoint, Mapping[str, str]]:
        """The merged model, and name in the base's files → name in its own, which transformers may write longer."""
        merged, stored = merged_model(adapter), dict[str, str]()
        for name, info in merged.tensors.items():
            module, _, leaf = name.rpartition(".")
            own = base_tensor(module, self.model, leaf=leaf)
            if own is None or self.model.tensors[own].shape != info.shape:
                where = "is not in" if own is None else "has another shape than in"
                raise InputError(
                    f"{adapter.reference}: merged, its {name} {where} {self.model.reference}",
                    "take the adapter's own tensors (space: factors)",
                )
            if own in stored:
                raise InputError(
                    f"{adapter.reference}: merged, its {name} and {stored[own]} are both {own} in "
                    f"{self.model.reference}",
                    "take the adapter's own tensors (space: factors)",
                )
            stored[own] = name
        return merged, stored
