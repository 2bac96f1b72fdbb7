"""Trains the masks of a problem: model, warm start, what may not be removed, training, export."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resafe.checkpoints.cachedir import cache_root
from resafe.deltas import origins, stored_copies
from resafe.errors import InputError
from resafe.masks import Mask, MaskLogits, MaskSettings, MaskTrainer, TrainSettings, export_mask
from resafe.masks.batches import Item
from resafe.masks.budget import KEPT
from resafe.masks.concrete import Export, check_rescale, top_of_single
from resafe.masks.engine import EngineSettings, checkpoint_layers
from resafe.masks.logits import gathered
from resafe.masks.padding import check_padding
from resafe.masks.processes import ALONE, Processes, launched, shard
from resafe.masks.train import batches_of
from resafe.provenance import described
from resafe.realign.base import Problem, checkpoint_digests, models_digest
from resafe.realign.orthogonal import orthogonal_removal
from resafe.realign.recorded import fusion_facts
from resafe.realign.safety import SafetyVector, agreements, fixed_outside
from resafe.realign.scores import encoded_items, mask_gradients, masked_model, with_head_size
from resafe.realign.warm import WarmStart, warm_logits, warm_scores

_EXAMPLES = 64


@dataclass(frozen=True)
class Limits:
    """What is removed from and what is left alone, whatever the loss says.

    Attributes:
        safety: The safety vector, for those that need it.
        conflict_only: Only what goes against the safety vector may be removed.
        orthogonal: The removal is made orthogonal to the task loss's gradient before it is exported.
    """

    safety: SafetyVector | None = None
    conflict_only: bool = False
    orthogonal: bool = False


def train_mask(
    problem: Problem,
    settings: MaskSettings,
    training: TrainSettings,
    export: Export,
    keep: float,
    warm: WarmStart | None = None,
    answer_tokens: int | None = None,
    engine: EngineSettings | None = None,
    limits: Limits | None = None,
) -> tuple[Mask, ...]:
    """Trains one mask for a problem, or one for each of its task vectors, and exports it.

    Raises:
        InputError: No model or no safety pairs were given, the task vectors do not fit the model, or the mask is
            rescaled to no effect.
    """
    check_rescale(settings)
    items, pad_id = encoded_items(problem, answer_tokens)
    batches_of(items, training)  # what does not fit is told before a model is loaded
    settings = with_head_size(settings, problem)
    processes, running, limits = launched(), engine or EngineSettings(), limits or Limits()
    first = settings if warm is None else replace(settings, sampling="direct", initial=1.0)
    taught = training.loss == "distill" or training.task_divergence > 0
    examples = len(problem.keep_of) > 0 and training.shares.get("task", 0) > 0
    apart = taught and examples and len(problem.vectors) > 1
    # Of several processes each holds a shard on its device, and the whole model may not fit there.
    place = "cpu" if processes.world > 1 else None
    model, logits = masked_model(problem, first, training.seed, running.dtype, apart, place)
    if settings.rescale != "none" and all(value.numel() == 1 for value in logits.values.values()):
        raise InputError(
            f"rescale {settings.rescale!r} over one value a tensor, which is always 1", "set rescale: none"
        )
    if running.gradient_checkpointing:
        checkpoint_layers(model)
    if processes.world > 1:
        shard(model, logits)
    check_padding(model, logits, items, pad_id, processes)
    if warm is not None:
        scores = warm_scores(problem, warm, model, logits, items, pad_id, limits.safety, processes)
        logits.start_from(settings, warm_logits(scores, warm, processes))
    if limits.conflict_only:
        assert limits.safety is not None
        against = agreements(logits, problem, limits.safety)
        logits.start_from(settings, fixed_outside(logits.values, against, KEPT))
    if running.logits == "bfloat16":
        logits.to(torch.bfloat16)
    trainer = MaskTrainer(
        model, logits, items, training, pad_id=pad_id, work=problem.work, progress=problem.progress, engine=running,
        processes=processes, references=_references(problem), models=models_digest(problem),
    )  # fmt: skip
    metrics = trainer.run()
    values = _exported(logits, settings, training, export, keep)
    if limits.conflict_only:  # whatever the export, which may remove a share of everything
        fixed = {key: gathered(value.detach()).float() >= KEPT for key, value in logits.values.items()}
        values = {key: torch.where(fixed[key].to(value.device), 1.0, value) for key, value in values.items()}
    facts: dict[str, Any] = {"training": described(training), "export": export, "metrics": metrics}
    if copies := stored_copies(problem.vectors[0]):
        facts["copies"] = dict(copies)  # for who applies the mask to files
    if limits.orthogonal:
        logits.to(torch.float32)
        gradient = task_gradient(model, logits, values, settings, items, pad_id, problem.progress, processes)
        values = orthogonal_removal(values, gradient)
        facts["orthogonal"] = True
    return logits.masks_of(values, settings, facts | checkpoint_digests(problem) | fusion_facts(problem.fusion))


def _exported(
    logits: MaskLogits, settings: MaskSettings, training: TrainSettings, export: Export, keep: float
) -> dict[str, Tensor]:
    last, masks, single = max(0, training.steps - 1), dict[str, Tensor](), dict[str, Tensor]()
    for key, sharded in logits.values.items():
        value = gathered(sharded)  # one at a time: all of them are as large as the model
        masks[key] = export_mask(value, settings, export, keep=keep, seed=training.seed, key=key, step=last)
        if value.numel() == 1:
            single[key] = value.detach().float()
    for task in range(logits.tasks if export == "top_k" else 0):  # of one value alone there is no share to keep
        sizes: dict[str, int] = {}
        for name, shape in logits.shapes.items():
            if (key := logits.key(name, task)) in single:
                sizes[key] = sizes.get(key, 0) + math.prod(shape)
        masks |= top_of_single({key: single[key] for key in sizes}, sizes, keep)
    return masks


def task_gradient(
    model: Any,
    logits: MaskLogits,
    masks: Mapping[str, Tensor],
    settings: MaskSettings,
    items: Sequence[Item],
    pad_id: int,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Mean of the task loss's gradients in the mask at m = 1 and at `masks`; the logits are overwritten.

    The mean of both ends makes what a removal changes exact to second order along the way.

    Raises:
        InputError: There are no task examples, or the mask is rescaled.
    """
    few = [item for item in items if item.side == "task"][:_EXAMPLES]
    if not few:
        raise InputError("orthogonal needs examples of the task", "give them: keep: … in a mask file")
    if settings.rescale != "none":
        raise InputError(f"orthogonal with rescale {settings.rescale!r}", "use rescale none")
    ends = []
    for mask in ({key: torch.ones_like(value) for key, value in masks.items()}, masks):
        logits.start_from(replace(settings, sampling="direct"), mask)
        ends.append(mask_gradients(model, logits, few, {"task": 1.0}, pad_id, progress, processes))
    return {key: gathered((ends[0][key] + ends[1][key]) / 2) for key in masks}


def _references(problem: Problem) -> Path | None:
    """Where reference log-probabilities are kept for other trainings: only if the models are known by content."""
    known = all(None not in origins(vector) for vector in problem.vectors)
    return cache_root() / "references" if problem.work is not None and known else None
