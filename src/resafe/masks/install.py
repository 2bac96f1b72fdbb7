"""Puts masks into a language model: which of its modules the tensors of a task vector belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from resafe.checkpoints import Checkpoint, Pieces, inject_adapter, parameter_pieces
from resafe.deltas import TaskVector, stored_copies
from resafe.errors import InputError, listed
from resafe.masks.concrete import MaskSettings
from resafe.masks.logits import Combine, MaskLogits, Refit
from resafe.masks.modules import Formed, MaskedLora, MaskedModule, MaskedWeight, MergedWeight, TurnedWeight

_SAMPLE = 4096
"""Entries of each tensor that go into the digest of the task vectors: enough to tell two models apart."""


def install_masks(
    model: nn.Module,
    vectors: Sequence[TaskVector],
    settings: MaskSettings,
    *,
    seed: int,
    combine: Combine,
    linear: bool,
    additive: bool = False,
    by_entry: bool = False,
    refit: Refit | None = None,
    storage: torch.dtype = torch.float32,
    apart: bool = False,
) -> MaskLogits:
    """Replaces the modules that the task vectors touch by masked ones, in place.

    Args:
        model: The plain base model (for adapters; PEFT puts those into it that are more than LoRA's factors) or any
            model of the aligned architecture (full weights).
        vectors: Task vectors over the same tensors.
        settings: The mask's settings.
        seed: Seed of the draws.
        combine: The fusion F for one tensor.
        linear: Whether F is linear in the task vectors; then it is applied once, before training.
        additive: Whether F({τ_k}) is the sum of what it makes of each τ_k beside zeros; then it is applied once with
            masks of their own, too.
        by_entry: Whether an entry of F depends on that entry of the task vectors alone: few rows are then formed alone.
        refit: Takes F's first pass over the whole model anew (see `MaskLogits.refresh`); None for an F without one.
        storage: Dtype in which aligned weights and task vectors are held; logits and masks are float32.
        apart: Hold every task vector as it is, in place of what F makes of them beforehand: then the tuned models can
            be read alone.

    Returns:
        The logits; train their `parameters()`.

    Raises:
        InputError: An adapter's factor has no linear layer in the model, or the vectors differ in names.
    """
    names = vectors[0].names
    for vector in vectors[1:]:
        if vector.names != names:
            only = sorted(set(names) ^ set(vector.names))[:3]
            raise InputError(
                f"the tuned models cover different tensors: {', '.join(only)}", "tune them with the same targets"
            )
    own = settings.per_task and len(vectors) > 1
    # What is scaled to norms is scaled before F, which may drop entries: nothing of F can be done beforehand.
    early = settings.rescale != "norm" and not apart
    linear, additive = linear and early and not own, additive and early and own
    logits = MaskLogits(settings, seed, len(vectors) if own else 1)
    logits.apart = apart
    hasher = hashlib.sha256()
    device = next(model.parameters()).device
    made: dict[str, MaskedWeight] = {}

    def weight(name: str) -> MaskedWeight:
        deltas = [vector.delta(name) for vector in vectors]
        aligned = vectors[0].aligned(name)
        for tensor in (aligned, *deltas):
            hasher.update(f"{name} {tuple(tensor.shape)}".encode())
            hasher.update(tensor.flatten()[:: max(1, tensor.numel() // _SAMPLE)].contiguous().numpy().tobytes())
        if linear:
            deltas = [combine(name, deltas)]
        elif additive:
            deltas = [combine(name, _alone(deltas, place)) for place in range(len(deltas))]
        held = [delta.to(storage) for delta in deltas]
        kept = None if linear or additive else combine
        made[name] = MaskedWeight(name, aligned.to(storage), held, logits, kept, by_entry)
        return made[name]

    factors, adapter = vectors[0].factor_modules(), vectors[0].adapter
    if factors is not None:
        _install_lora(model, factors, weight)
    elif adapter is not None:
        _install_adapter(model, adapter, vectors, weight)
    else:
        _install_full(model, vectors, weight, storage)
    logits.vectors_digest = hasher.hexdigest()
    logits.fit_fusion_to(refit, lambda name: _masked_now(made.get(name), vectors, name))
    model.requires_grad_(False)
    logits.requires_grad_(True)
    model.to(device)
    logits.to(device)
    return logits


def _alone(deltas: Sequence[Tensor], place: int) -> list[Tensor]:
    return [delta if at == place else torch.zeros_like(delta) for at, delta in enumerate(deltas)]


def _masked_now(weight: MaskedWeight | None, vectors: Sequence[TaskVector], name: str) -> list[Tensor]:
    """The masked task vectors of a tensor; zeros for one that is no parameter of the model and so stays aligned."""
    return [torch.zeros(vector.shape(name)) for vector in vectors] if weight is None else weight.masked()


def _install_lora(
    model: nn.Module, factors: Mapping[str, tuple[str, str, float]], weight: Callable[[str], MaskedWeight]
) -> None:
    for module, (a, b, scale) in factors.items():
        base = _linear(model, module)
        _replace(model, module, MaskedLora(base, weight(a), weight(b), scale))


def _install_adapter(
    model: nn.Module, adapter: Checkpoint, vectors: Sequence[TaskVector], weight: Callable[[str], MaskedWeight]
) -> None:
    """Masks the tensors of an adapter of any kind, inside PEFT's own layers: these compute with the masked ones.

    What did not learn has no mask: it is in the layers as the adapter has it.

    Raises:
        InputError: PEFT cannot put the adapter into the model, or has no place in it for a tensor that learnt.
    """
    places, made = inject_adapter(model, adapter), dict[str, MaskedWeight]()
    masks: dict[str, dict[str, Formed]] = {}
    learnt = [name for name in vectors[0].names if _moved(vectors, name)]
    if left := [name for name in learnt if name not in places]:
        raise InputError(
            f"{adapter.reference}: PEFT has no place in the model for\n  {listed(left)}",
            "take the adapter as its weights (space: weights)",
        )
    for name in learnt:
        made[name] = weight(name)  # one, where tied layers have it both
        for layer, parameter in places[name]:
            shape = model.get_submodule(layer).get_parameter(parameter).shape
            as_stored = shape == made[name].aligned.shape
            masks.setdefault(layer, {})[parameter] = made[name] if as_stored else TurnedWeight(made[name])
    for path, own in masks.items():
        _replace(model, path, MaskedModule(model.get_submodule(path), own))


def _install_full(
    model: nn.Module, vectors: Sequence[TaskVector], weight: Callable[[str], MaskedWeight], storage: torch.dtype
) -> None:
    """Masks every parameter that tuning changed: at m = 1 the model is the tuned one, at m = 0 the aligned one.

    Parameters that it left alone become the aligned model's, whatever they were.

    Raises:
        InputError: Tuning changed a tensor that makes up no parameter of the model.
    """
    shapes, copies = {name: vectors[0].shape(name) for name in vectors[0].names}, stored_copies(vectors[0])
    shapes |= {copy: shapes[name] for copy, name in copies.items()}
    covered = {own: pieces.called(copies) for own, pieces in parameter_pieces(model, shapes).items()}
    found: dict[int, Pieces] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in covered:
            found.setdefault(id(parameter), covered[name])  # tied parameters have one name, and one mask
    taken = {name for pieces in found.values() for name in pieces.names}

    changed = {name for name in taken if _moved(vectors, name)}
    if left := [name for name in vectors[0].names if name not in taken and _moved(vectors, name)]:
        raise InputError(
            f"tuning changed {len(left)} tensors that are no parameters of the loaded model:\n  {listed(left)}",
            "transformers splits, permutes or ties them as it loads the model: tune an adapter on its other layers and "
            "mask that, or take a method that puts no masks into the model (interpolation, random_mask, dare)",
        )

    def masked(pieces: Pieces) -> MaskedWeight | MergedWeight:
        if pieces.whole:
            return weight(pieces.names[0])
        aligned = {name: vectors[0].aligned(name).to(storage) for name in pieces.names if name not in changed}
        return MergedWeight(pieces, [weight(name) for name in pieces.names if name in changed], aligned)

    made: dict[Pieces, MaskedWeight | MergedWeight] = {}
    for path, module in reversed(list(model.named_modules())):  # a module is replaced after those inside it
        masks: dict[str, Formed] = {}
        for local, parameter in list(module.named_parameters(recurse=False)):
            pieces = found.get(id(parameter))
            if pieces is None:
                continue
            if changed.isdisjoint(pieces.names):
                parameter.data.copy_(pieces.merged(vectors[0].aligned))
            else:
                made[pieces] = masks[local] = made.get(pieces) or masked(pieces)
        if masks and not path:
            raise InputError(f"'{min(masks)}' belongs to the model itself and to no module", "mask an adapter of it")
        if masks:
            _replace(model, path, MaskedModule(module, masks))


def _moved(vectors: Sequence[TaskVector], name: str) -> bool:
    return any(bool(vector.delta(name).any()) for vector in vectors)


def _linear(model: nn.Module, path: str) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    try:
        child = model.get_submodule(path)
    except AttributeError:
        child = None
    if not isinstance(child, nn.Linear | Conv1D):
        raise InputError(f"the model has no linear layer '{path}'", "is the adapter of another base model?")
    return child


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
