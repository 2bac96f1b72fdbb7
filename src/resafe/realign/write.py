"""Writes a realigned model in the form its inputs had: an adapter stays an adapter, a full model a full model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resafe.checkpoints import Checkpoint, save_adapter, save_model
from resafe.deltas import TaskVector, stored_copies
from resafe.errors import InputError, listed
from resafe.realign.base import Realigned


def write_realigned(
    out: Path, vectors: Sequence[TaskVector], realigned: Realigned, tuned: Checkpoint, card: str
) -> Path:
    """Writes the realigned tensors; whatever the task vectors do not cover is taken from the tuned checkpoint.

    Args:
        out: Directory to write.
        vectors: The task vectors, for their names and space.
        realigned: Tensor name → value.
        tuned: The (first) tuned checkpoint: its configuration, tokenizer and, for full models, its other tensors.
        card: Text of README.md.

    Returns:
        `out`.

    Raises:
        InputError: The model has no place for a tensor of the task vectors.
    """
    covered = {name: name for name in vectors[0].names} | dict(stored_copies(vectors[0]))
    if vectors[0].adapter is not None:
        tensors = {name: realigned(of) for name, of in covered.items()}
        turned = [name for name, tensor in tensors.items() if tensor.shape != tuned.tensors[name].shape]
        return save_adapter(out, tensors | {name: tensors[name].T for name in turned}, tuned, card)
    model = tuned if tuned.kind == "model" else tuned.base
    assert model is not None  # a task vector of an adapter cannot be made without its base
    if left := [name for name in covered if name not in model.tensors]:
        raise InputError(f"{model.reference} does not have what was realigned:\n  {listed(left)}", "check the base")
    tensors = {
        name: realigned(covered[name]).to(info.dtype) if name in covered else model.read(name)
        for name, info in model.tensors.items()
    }
    return save_model(out, tensors, tuned, card)  # an adapter may bring a tokenizer of its own
