"""Modules whose task vectors pass through masks: weights θ_a + F(m ⊙ τ) formed inside the owning module.

Aligned weights and task vectors are frozen parameters (not buffers: FSDP2 shards parameters only), the logits are
trainable parameters of the same module; only they learn. Knows nothing of losses, data or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from resafe.checkpoints import Pieces
from resafe.masks.concrete import norm_kept
from resafe.masks.logits import Combine, MaskLogits


class MaskedWeight(nn.Module):
    """One weight θ_a + F({m ⊙ τ_k}), formed anew at each call.

    Args:
        name: The tensor's name in the task vectors.
        aligned: θ_a, float.
        deltas: τ_k, or what F makes of them beforehand: one tensor where F is linear and the mask is shared, one a
            mask where F is a sum and every task vector has its own.
        logits: The model's logits.
        combine: F, or None where the masked `deltas` are only added up.
        by_entry: Whether an entry of F depends on that entry of the task vectors alone, so that F of rows is F's rows.
    """

    def __init__(
        self,
        name: str,
        aligned: Tensor,
        deltas: Sequence[Tensor],
        logits: MaskLogits,
        combine: Combine | None,
        by_entry: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.aligned = nn.Parameter(aligned, requires_grad=False)
        self.deltas = nn.ParameterList(nn.Parameter(delta, requires_grad=False) for delta in deltas)
        # The logits belong here: only what a module owns is whole inside its forward when parameters are sharded.
        self.logits = nn.ParameterList(logits.add(name, tuple(aligned.shape)))
        self._settings = (logits,)  # in a tuple: it is one for the model, and its parameters are ours already
        self._combine = combine
        self._by_entry = by_entry or combine is None

    @property
    def drawn(self) -> bool:
        """Whether its masks are random."""
        return self._settings[0].settings.sampling in ("relaxed", "straight_through")

    @property
    def kept(self) -> bool:
        """Whether keeping it for the backward pass is cheaper than forming it again: where a CPU draws step by step."""
        device = self.aligned.device
        return self.drawn and device.type == "cpu" and not self._settings[0].kernels.used_on(device)

    def keys(self) -> list[str]:
        """The keys of the logits, in their order."""
        return [self._settings[0].key(self.name, task) for task in range(len(self.logits))]

    def _masks(self, rows: Tensor | None = None) -> list[Tensor | float]:
        values: list[Tensor] = list(self.logits)
        if rows is not None and values[0].shape[0] == self.aligned.shape[0]:
            values = [functional.embedding(rows, value) for value in values]
        masks = [self._settings[0].mask(self.name, value, task) for task, value in enumerate(values)]
        return masks * len(self.deltas) if len(masks) == 1 else masks

    def _fused(self) -> list[tuple[Tensor, Tensor | None]] | None:
        """What the masks are formed from in one pass; None where they are formed step by step."""
        found = [self._settings[0].parts(self.name, value, task) for task, value in enumerate(self.logits)]
        parts = [part for part in found if part is not None]
        if not parts:
            return None
        return parts * len(self.deltas) if len(parts) == 1 else parts

    def masked(self) -> list[Tensor]:
        """The masked task vectors {m ⊙ τ_k}, scaled to their norms where the settings say so, float32."""
        fused = self._fused()
        if fused is not None:
            logits = self._settings[0]
            return [
                logits.kernels.delta(*part, delta, logits.settings)
                for part, delta in zip(fused, self.deltas, strict=True)
            ]
        keep_norm, found = self._settings[0].settings.rescale == "norm", []
        for mask, delta in zip(self._masks(), self.deltas, strict=True):
            part = delta.float() * mask
            found.append(norm_kept(part, delta.float()) if keep_norm and isinstance(mask, Tensor) else part)
        return found

    def forward(self) -> Tensor:
        """The weight, shape and dtype of `aligned`."""
        logits = self._settings[0]
        if logits.off:  # nothing to form: a teacher's pass costs what the plain model's does
            return self.aligned
        if logits.alone is not None:
            return _tuned(self.aligned, self.deltas[logits.alone])
        if self._combine is not None:
            fused = logits.combine(self._combine)(self.name, self.masked())
            return (self.aligned + fused).to(self.aligned.dtype)
        parts = self._fused()
        if parts is not None:
            weight: Tensor = self.aligned
            for part, delta in zip(parts, self.deltas, strict=True):
                weight = logits.kernels.weight(*part, delta, weight, logits.settings)
            return weight
        return _added(self.aligned, self.deltas, self._masks())

    def rows(self, index: Tensor) -> Tensor:
        """The rows `index`, shape (rows, …): formed alone where an entry of the mask depends on its logit only."""
        if self._settings[0].off:
            return self.aligned[index]
        alone = self._settings[0].alone
        if alone is not None:
            return _tuned(self.aligned[index], self.deltas[alone][index])
        if not self._by_entry or self.drawn or self._settings[0].settings.rescale != "none":
            every: Tensor = self()
            return every[index]
        masks, deltas = self._masks(index), [delta[index] for delta in self.deltas]
        if self._combine is None:
            return _added(self.aligned[index], deltas, masks)
        fused = self._combine(self.name, [delta.float() * mask for delta, mask in zip(deltas, masks, strict=True)])
        return (self.aligned[index] + fused).to(self.aligned.dtype)


class MergedWeight(nn.Module):
    """One weight that the model merges from several tensors of its files (the experts of a layer), formed at each call.

    Each tensor that tuning changed has a mask of its own; the others are the aligned model's.

    Args:
        pieces: The tensors' names, and how they are merged.
        masked: Those that are masked.
        aligned: The others by name, float.
    """

    def __init__(self, pieces: Pieces, masked: Sequence[MaskedWeight], aligned: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.masked = nn.ModuleList(masked)
        self.aligned = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in aligned.values())
        self._pieces, self._names = pieces, (*aligned, *(weight.name for weight in masked))

    @property
    def kept(self) -> bool:
        """Whether keeping it for the backward pass is cheaper than forming it again."""
        return any(weight.kept for weight in self.masked)

    def forward(self) -> Tensor:
        """The weight, in the shape that the model has it in."""
        tensors = [*self.aligned, *(weight() for weight in self.masked)]
        return self._pieces.merged(dict(zip(self._names, tensors, strict=True)).__getitem__)

    def rows(self, index: Tensor) -> Tensor:
        """The rows `index`, shape (rows, …)."""
        every: Tensor = self()
        return every[index]


def _key(name: str) -> str:
    """A parameter's name as a module may be called."""
    return name.replace(".", "/")


class TurnedWeight(nn.Module):
    """The transpose of a masked matrix, as the output layer has it where its adapter is tied to the embedding's."""

    def __init__(self, weight: MaskedWeight) -> None:
        super().__init__()
        self.weight = weight

    @property
    def kept(self) -> bool:
        """As the matrix itself."""
        return self.weight.kept

    def forward(self) -> Tensor:
        """The transpose."""
        found: Tensor = self.weight()
        return found.T

    def rows(self, index: Tensor) -> Tensor:
        """The rows `index` of the transpose."""
        every: Tensor = self()
        return every[index]


Formed = MaskedWeight | MergedWeight | TurnedWeight
"""What forms a parameter."""


def _tuned(aligned: Tensor, delta: Tensor) -> Tensor:
    return (aligned + delta.float()).to(aligned.dtype)


def _added(weight: Tensor, deltas: Iterable[Tensor], masks: Sequence[Tensor | float]) -> Tensor:
    for mask, delta in zip(masks, deltas, strict=True):
        weight = torch.addcmul(weight, delta, _tensor(mask, weight))
    return weight


def _tensor(mask: Tensor | float, like: Tensor) -> Tensor:
    return (
        mask.to(like.dtype) if isinstance(mask, Tensor) else torch.full((), mask, dtype=like.dtype, device=like.device)
    )


class MaskedLora(nn.Module):
    """A frozen linear layer (or GPT-2's Conv1D) with a LoRA pair whose factors are masked: W x + s · B(A x)."""

    def __init__(self, base: nn.Module, a: MaskedWeight, b: MaskedWeight, scaling: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scaling = base, a, b, scaling

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (…, in) to (…, out)."""
        a, b = self.a().to(x.dtype), (self.b() * self.scaling).to(x.dtype)  # masks are formed in float32
        update = functional.linear(functional.linear(x, a), b)
        found: Tensor = self.base(x) + update
        return found

    def __getattr__(self, name: str) -> Any:
        """What the rest of a model asks of the layer itself (Jamba its bias, RWKV its weight): the base's.

        As in PEFT, whose layers give the base's `weight` and `bias` without the adapter's product, so that the model
        that was tuned is the one that is masked.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":  # not set yet
                raise
        return getattr(self.base, name)


class MaskedModule(nn.Module):
    """A module of any kind (linear layer, embedding, norm) whose parameters are masked.

    The backward pass forms the weights again: kept, the masks and weights of all layers would be a second and a third
    copy of the model. A draw is made again with the numbers it had, as they are keyed by the step; where a CPU draws
    step by step the weights are kept, as random numbers cost more than their memory there.

    Args:
        base: The module. Each parameter that is masked leaves one entry behind, which tells its dtype.
        weights: The masked weights by the names of its own parameters, or of those of modules inside it (an adapter's
            "lora_A.default.weight"); a tied one is the same in two modules.

    Attributes:
        again: Whether the weights are formed again in the backward pass; None where that is cheaper than keeping them.
    """

    def __init__(self, base: nn.Module, weights: Mapping[str, Formed]) -> None:
        super().__init__()
        self._names = tuple(weights)
        self.base, self.weights = base, nn.ModuleDict({_key(name): weight for name, weight in weights.items()})
        self.again: bool | None = None
        if _looks_up(base):
            base.padding_idx = None  # it would be a row of the few that are formed; padding has no gradient here
        for name in weights:
            owner, _, leaf = name.rpartition(".")
            left = nn.Parameter(base.get_parameter(name).new_empty(1), requires_grad=False)
            setattr(base.get_submodule(owner), leaf, left)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What the module computes with its masked weights."""
        again = self.again if self.again is not None else not any(weight.kept for weight in self._masked())
        if not again or not torch.is_grad_enabled():
            return self._computed(*arguments, **named)
        return checkpoint(self._computed, *arguments, use_reentrant=False, preserve_rng_state=False, **named)

    def _masked(self) -> list[Formed]:
        found: Any = self.weights.values()
        return list(found)

    def _computed(self, *arguments: Any, **named: Any) -> Any:
        if _looks_up(self.base):  # most of a small model, and most of its rows are not asked for
            index, places = arguments[0].unique(return_inverse=True)
            rows = self._masked()[0].rows(index).to(self.base.weight.dtype)
            return functional_call(self.base, {"weight": rows}, (places,))
        formed = {name: self._formed(name) for name in self._names}
        return functional_call(self.base, formed, arguments, named)

    def _formed(self, name: str) -> Tensor:
        weight: Tensor = self.weights[_key(name)]()
        return weight.to(self.base.get_parameter(name).dtype)

    def __getattr__(self, name: str) -> Any:
        """What the rest of a model asks of the module itself, its weight as it is now included."""
        held = self.__dict__["_modules"]
        if name in held:
            return held[name]
        return self._formed(name) if name in self.__dict__["_names"] else getattr(held["base"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the rest of a model sets on the module itself: RecurrentGemma takes the state of a call back there."""
        base = self.__dict__.get("_modules", {}).get("base")
        if base is not None and name not in self.__dict__ and name in base.__dict__:
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)


def _looks_up(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether a module takes tokens and gives rows of its weight: an embedding, or one of transformers' scaled ones.

    Embeddings of positions are subclasses too, and find the rows from a mask or from an offset of their own.
    """
    scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    return isinstance(module, nn.Embedding) and (type(module).forward is nn.Embedding.forward or scaled)
