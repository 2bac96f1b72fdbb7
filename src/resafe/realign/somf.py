"""SOMF: a learned mask over the task vectors, shared by all tuned models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from resafe.deltas import origins
from resafe.masks import PRESETS, Mask, MaskLogits, MaskSettings, MaskTrainer, TrainSettings, export_mask
from resafe.masks.batches import Item
from resafe.masks.checkpoint import load_state, save_state
from resafe.masks.concrete import Export, Granularity, Rescale, Sampling
from resafe.masks.engine import EngineSettings, OptimizerName, StorageName, checkpoint_layers
from resafe.masks.format import load_masks
from resafe.masks.logits import whole
from resafe.masks.losses import LossName
from resafe.masks.processes import Processes, launched, shard
from resafe.masks.train import Reference
from resafe.provenance import digest_value
from resafe.realign.base import Family, Problem, realign_method
from resafe.realign.mask_family import mask_family
from resafe.realign.scores import encoded_items, masked_model, removal_mask, removal_scores, with_head_size


def _given(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if value is not None}


@dataclass(frozen=True)
class WarmStart:
    """Logits that start from first-order removal scores instead of one constant.

    Attributes:
        share: Share of entries, those with the highest positive scores, that start removed.
        removed: Their logit.
        kept: The logit of all others.
        examples: Items of each side that the scores are computed on.
    """

    share: float = 0.02
    removed: float = -1.0
    kept: float = 3.0
    examples: int = 64


def warm_logits(scores: dict[str, Tensor], warm: WarmStart) -> dict[str, Tensor]:
    """Initial logits by key."""
    masks = removal_mask(scores, warm.share)
    return {key: torch.where(mask > 0.5, warm.kept, warm.removed) for key, mask in masks.items()}


def _stored_scores(
    problem: Problem,
    warm: WarmStart,
    model: Any,
    logits: MaskLogits,
    items: list[Item],
    pad_id: int,
    processes: Processes,
) -> dict[str, Tensor]:
    """The scores, kept beside the training's checkpoints so that a resumed run does not compute them again."""
    path = problem.work / "scores.safetensors" if problem.work else None
    tokens = [(item.side, item.chosen.prompt, item.chosen.answer) for item in items]
    identity = digest_value([warm.examples, asdict(logits.settings), logits.vectors_digest, tokens])
    processes.wait()
    stored = load_state(path, identity) if path else None
    if not processes.agree(stored is not None):
        stored = removal_scores(model, logits, items, warm.examples, pad_id, problem.progress, processes)
        if path and processes.main:
            save_state(path, stored, identity)
    assert stored is not None
    return stored


def train_mask(
    problem: Problem,
    settings: MaskSettings,
    training: TrainSettings,
    export: Export,
    keep: float,
    warm: WarmStart | None = None,
    answer_tokens: int | None = None,
    engine: EngineSettings | None = None,
) -> tuple[Mask, ...]:
    """Trains one mask for a problem, or one for each of its task vectors, and exports it.

    Raises:
        InputError: No model or no safety pairs were given, or the task vectors do not fit the model.
    """
    items, pad_id = encoded_items(problem, answer_tokens)
    settings = with_head_size(settings, problem)
    processes, running = launched(), engine or EngineSettings()
    first = settings if warm is None else replace(settings, sampling="direct", initial=1.0)
    model, logits = masked_model(problem, first, training.seed, running.dtype)
    if running.gradient_checkpointing:
        checkpoint_layers(model)
    if processes.world > 1:
        shard(model, logits)
    if warm is not None:
        scores = _stored_scores(problem, warm, model, logits, items, pad_id, processes)
        logits.start_from(settings, warm_logits(scores, warm))
    trainer = MaskTrainer(
        model, logits, items, training, pad_id=pad_id, work=problem.work, progress=problem.progress, engine=running,
        processes=processes,
    )  # fmt: skip
    metrics = trainer.run()
    last = max(0, training.steps - 1)
    values = {
        key: export_mask(whole(value), settings, export, keep=keep, seed=training.seed, key=key, step=last)
        for key, value in logits.values.items()
    }
    facts = {"training": asdict(training), "export": export, "metrics": metrics}
    return logits.masks_of(values, settings, facts | _digests(problem))


def _digests(problem: Problem) -> dict[str, Any]:
    """Of the aligned and the tuned checkpoints, so that who applies the mask can tell whether it belongs there."""
    pairs = [origins(vector) for vector in problem.vectors]
    aligned, tuned = pairs[0][0], [checkpoint.digest for _, checkpoint in pairs if checkpoint is not None]
    return ({"aligned": aligned.digest} if aligned is not None else {}) | {"tuned": tuned}


@realign_method(
    "somf", title="SOMF, learned mask", source="Yi et al. 2024, arXiv 2405.09055", trains=True, makes_mask=True
)
def somf(
    problem: Problem,
    *,
    preset: Literal["default", "paper"] = "default",
    granularity: Granularity | None = None,
    sampling: Sampling | None = None,
    temperature: float | None = None,
    rescale: Rescale | None = None,
    initial: float | None = None,
    loss: LossName | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    beta: float | None = None,
    reference: Reference | None = None,
    shares: dict[str, float] | None = None,
    removal_price: float | None = None,
    task_divergence: float | None = None,
    label_smoothing: float | None = None,
    export: Export | None = None,
    keep: float = 0.5,
    per_task: bool | None = None,
    gradient_checkpointing: bool = False,
    storage: StorageName = "float32",
    optimizer: OptimizerName = "adamw",
    report_to: tuple[str, ...] = (),
    share_prompts: bool | None = None,
    strengths: tuple[float, ...] = (0.9, 1.0, 1.1),
    shuffle: bool = False,
    answer_tokens: int | None = None,
    warm_share: float | None = None,
    warm_removed: float = -1.0,
    warm_kept: float = 3.0,
    mask: Path | None = None,
) -> Family:
    """Trains (or reads) one mask over the task vectors of all tuned models; settings left out come from the preset.

    Args:
        problem: The realignment; needs pairs and a model unless `mask` is given.
        preset: "default" or "paper".
        granularity: What shares one logit.
        sampling: How training forms the mask.
        temperature: T of the relaxed draw.
        rescale: Division of the mask by its mean, or scaling of the masked task vectors to their norms.
        initial: φ₀.
        loss: "sft" or a preference loss by TRL's name.
        steps: Optimiser steps.
        learning_rate: Peak learning rate of the logits.
        batch_size: Items a step.
        beta: β of DPO.
        reference: π_ref of DPO.
        shares: Composition of a batch by side (safety, harmless, task).
        removal_price: Weight of the mean removed share in the objective.
        task_divergence: Weight of KL(tuned ‖ realigned) on the answers of task examples.
        label_smoothing: Share of pairs taken to be labelled wrongly, for "robust" and "exo_pair".
        export: What leaves training.
        keep: Keep rate of the "top_k" export.
        per_task: A mask of its own for each tuned model, in place of one that all share.
        gradient_checkpointing: Compute layers again in the backward pass, in place of keeping what is inside them.
        storage: Precision in which aligned weights and task vectors are held in training.
        optimizer: "adamw", or "adamw_8bit" with moments of a byte each (needs torchao).
        report_to: Trackers: tensorboard, wandb, trackio, mlflow, …
        share_prompts: Compute the prompt of a pair once for both answers, where the model is found able to; by default
            all but the paper's preset does.
        strengths: Grid of the mask's strength; 1 is the mask itself.
        shuffle: Shuffle the mask within each tensor: the control for what the mask knows.
        answer_tokens: Tokens of the pairs' answers that count; whether to refuse is decided in the first few.
        warm_share: Share of entries that first-order scores mark for removal at the start; 0 starts from φ₀ everywhere.
        warm_removed: Initial logit of those.
        warm_kept: Initial logit of the others.
        mask: A mask directory to apply instead of training one.
    """
    if mask is not None:
        return mask_family(problem, load_masks(mask), strengths, shuffle=shuffle)
    chosen = PRESETS[preset]
    settings = replace(
        chosen.mask,
        **_given(
            granularity=granularity,
            sampling=sampling,
            temperature=temperature,
            rescale=rescale,
            initial=initial,
            per_task=per_task,
        ),
    )
    training = replace(
        chosen.training,
        seed=problem.seed,
        **_given(
            loss=loss, steps=steps, learning_rate=learning_rate, batch_size=batch_size, beta=beta,
            reference=reference, shares=shares, removal_price=removal_price, task_divergence=task_divergence,
            label_smoothing=label_smoothing,
        ),
    )  # fmt: skip
    share = chosen.warm_share if warm_share is None else warm_share
    warm = WarmStart(share, warm_removed, warm_kept) if share > 0 else None
    tokens = answer_tokens or chosen.answer_tokens
    engine = EngineSettings(
        gradient_checkpointing, storage, optimizer, report_to,
        preset != "paper" if share_prompts is None else share_prompts,
    )  # fmt: skip
    trained = train_mask(problem, settings, training, export or chosen.export, keep, warm, tokens, engine)
    return mask_family(problem, trained, strengths, shuffle=shuffle)
