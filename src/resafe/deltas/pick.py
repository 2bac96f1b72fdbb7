"""Which kind of task vector two checkpoints make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from resafe.checkpoints import Checkpoint
from resafe.deltas.base import TaskVector
from resafe.deltas.fresh import FreshAdapter
from resafe.deltas.full import DifferenceVector, different_settings
from resafe.deltas.lora import LoraProductVector, is_plain
from resafe.deltas.merged import MergedVector
from resafe.errors import InputError
from resafe.registry import nearest

Space = Literal["auto", "factors", "weights"]
"""Where an adapter's change is taken: in its own tensors (the factors A and B apart), or in the weights.

"auto" is its own tensors, where it is known what they were before the adapter was trained.
"""


def task_vector(tuned: Checkpoint, aligned: Checkpoint, space: Space = "auto") -> TaskVector:
    """The task vector τ = tuned − aligned; reads headers only.

    Args:
        tuned: A model, or an adapter.
        aligned: The model or adapter it started from; an adapter's plain base counts as a zero adapter.
        space: For adapters. In the weights an adapter that is more than LoRA's factors is merged by PEFT first, when
            something is read. Full models are always in weight space.

    Raises:
        InputError: The two do not belong together (other base, other shapes, a model against an adapter), or there is
            no such space.
    """
    if space not in get_args(Space):
        raise InputError(f"there is no space '{space}'", nearest(space, get_args(Space)))
    if tuned.kind == "model":
        if aligned.kind != "model":
            raise InputError(
                f"{tuned.reference} is a full model, {aligned.reference} an adapter",
                "merge the aligned adapter into its model first, or tune an adapter",
            )
        return DifferenceVector(tuned, aligned)
    safe = aligned if aligned.kind == "adapter" else None
    model = aligned if safe is None else safe.base
    if tuned.base is None or model is None:
        raise InputError(f"{tuned.reference}: the adapter's base model is not known", "name it as base+adapter")
    if tuned.base.digest != model.digest:
        raise InputError(
            f"{tuned.reference} sits on {tuned.base.reference}, {aligned.reference} on {model.reference}",
            "both adapters must sit on the same base model; name it as base+adapter",
        )
    if space == "factors" or (space == "auto" and (safe is not None or FreshAdapter.known(tuned))):
        return DifferenceVector(tuned, safe)
    plain = is_plain(tuned) and (safe is None or is_plain(safe))
    return LoraProductVector(tuned, safe, model) if plain else MergedVector(tuned, safe, model)


def task_vectors(tuned: Sequence[Checkpoint], aligned: Checkpoint, space: Space = "auto") -> list[TaskVector]:
    """`task_vector` of several tuned models that are to be combined; reads headers only.

    Where one of several adapters can only be taken as its weights all are, so that they cover the same tensors.
    """
    vectors = [task_vector(one, aligned, space) for one in tuned]
    if space == "auto" and any(isinstance(vector, LoraProductVector | MergedVector) for vector in vectors):
        vectors = [task_vector(one, aligned, "weights") for one in tuned]
    if not any(isinstance(vector, MergedVector) for vector in vectors):
        return vectors
    return [
        MergedVector(vector.tuned, vector.safe, vector.model) if isinstance(vector, LoraProductVector) else vector
        for vector in vectors
    ]


def origins(vector: TaskVector) -> tuple[Checkpoint | None, Checkpoint | None]:
    """The aligned and the tuned checkpoint of a task vector; None for what it does not know."""
    if isinstance(vector, LoraProductVector | MergedVector):
        return vector.safe or vector.model, vector.tuned
    if isinstance(vector, DifferenceVector):
        return vector.base or vector.tuned.base, vector.tuned
    return None, None


def stored_copies(vector: TaskVector) -> Mapping[str, str]:
    """Tensors of the checkpoints that are copies of one that the vector covers: name → that one's."""
    return vector.copies if isinstance(vector, DifferenceVector | MergedVector) else {}


def check_together(vectors: Sequence[TaskVector]) -> None:
    """Checks that task vectors can be combined tensor by tensor; reads headers only.

    Raises:
        InputError: They cover different tensors, differ in shapes, or are of adapters whose settings differ in what
            the tensors mean, as in their scale.
    """
    for first, vector in ((vectors[0], other) for other in vectors[1:]):
        if only := sorted(set(first.names) ^ set(vector.names)):
            raise InputError(
                f"the tuned models cover different tensors: {', '.join(only[:3])}", "tune them with the same targets"
            )
        for name in first.names:
            if first.shape(name) != vector.shape(name):
                raise InputError(
                    f"the tuned models differ in {name}: {first.shape(name)} and {vector.shape(name)}",
                    "tune them with the same rank, or combine them in the weights (space: weights)",
                )
        if first.adapter is None or vector.adapter is None:
            continue  # the weights themselves
        if unlike := different_settings(first.adapter, vector.adapter):
            raise InputError(
                f"the tuned adapters' tensors do not mean the same: they differ in {', '.join(unlike)}",
                "tune them with the same settings, or combine them in the weights (space: weights)",
            )
