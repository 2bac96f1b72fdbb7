"""SOMF: a learned mask over the task vectors, shared by all tuned models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from resafe.errors import InputError
from resafe.masks import PRESETS
from resafe.masks.budget import LayerBudget
from resafe.masks.concrete import Export, Granularity, Rescale, Sampling
from resafe.masks.engine import EngineSettings, OptimizerName, StorageName
from resafe.masks.format import load_masks
from resafe.masks.fused import FusedName
from resafe.masks.losses import LossName
from resafe.masks.reference import Reference
from resafe.realign.base import Family, Problem, check_strengths, realign_method
from resafe.realign.learn import Limits, train_mask
from resafe.realign.mask_family import mask_family
from resafe.realign.safety import safety_vector
from resafe.realign.warm import WarmScores, WarmStart

LATER = ("warm_scores", "layer_budget", "conflict_only", "orthogonal", "base", "unaligned", "logits",
         "step_in_backward", "fused", "seed")  # fmt: skip


def _given(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if value is not None}


@realign_method(
    "somf", title="SOMF, learned mask", source="Yi et al. 2024, arXiv 2405.09055", trains=True, makes_mask=True,
    later=LATER,
)  # fmt: skip
def somf(
    problem: Problem,
    *,
    preset: Literal["default", "labels", "paper"] = "default",
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
    strengths: tuple[float, ...] = (0.8, 1.0, 1.2),
    shuffle: bool = False,
    answer_tokens: int | Literal["all"] | None = None,
    warm_share: float | None = None,
    warm_removed: float = -1.0,
    warm_kept: float | None = None,
    mask: Path | None = None,
    warm_scores: WarmScores = "gradient",
    layer_budget: LayerBudget | None = None,
    conflict_only: bool = False,
    orthogonal: bool = False,
    base: str | None = None,
    unaligned: str | None = None,
    logits: StorageName = "float32",
    step_in_backward: bool = False,
    fused: FusedName = "auto",
    seed: int | None = None,
) -> Family:
    """Trains (or reads) one mask over the task vectors of all tuned models; settings left out come from the preset.

    Args:
        problem: The realignment; needs pairs and a model unless `mask` is given.
        preset: "default" (from the models), "labels" (from the pairs' answers) or "paper".
        granularity: What shares one logit.
        sampling: How training forms the mask.
        temperature: T of the relaxed draw.
        rescale: Division of the mask by its mean, or scaling of the masked task vectors to their norms.
        initial: φ₀; with a warm start that of the entries that are not marked, unless `warm_kept` says otherwise.
        loss: "sft", "distill" (from the aligned model on pairs, from the tuned ones on task examples), or a preference
            loss by TRL's name.
        steps: Optimiser steps.
        learning_rate: Peak learning rate of the logits.
        batch_size: Items a step.
        beta: β of DPO.
        reference: π_ref of DPO.
        shares: Composition of a batch by side (safety, harmless, task).
        removal_price: Weight of the mean removed share in the objective.
        task_divergence: Weight of KL(tuned ‖ realigned) on the answers of task examples.
        label_smoothing: Share of pairs taken to be labelled wrongly, for "robust", "exo_pair" and "aot".
        export: What leaves training.
        keep: Keep rate of the "top_k" export.
        per_task: A mask of its own for each tuned model, in place of one that all share.
        gradient_checkpointing: Compute layers again in the backward pass, in place of keeping what is inside them.
        storage: Precision in which aligned weights and task vectors are held in training.
        optimizer: "adamw", or "adamw_8bit" with moments of a byte each (extra `lowbit`).
        report_to: Trackers: tensorboard, wandb, trackio, mlflow, …
        share_prompts: Compute the prompt of a pair once for both answers, where the model is found able to; by default
            all but the paper's preset does.
        strengths: Grid of the mask's strength; 1 is the mask itself.
        shuffle: Shuffle the mask within each tensor: the control for what the mask knows.
        answer_tokens: Tokens of the pairs' answers that count, or "all"; whether to refuse is decided in the first few.
        warm_share: Share of entries that scores mark for removal at the start; 0 starts from φ₀ everywhere.
        warm_removed: Initial logit of those.
        warm_kept: Initial logit of the others.
        mask: A mask directory to apply instead of training one.
        warm_scores: The scores of the warm start: first-order ("gradient") or with the Fisher diagonal; the smallest
            entries ("magnitude"); or those that go against the safety vector ("sign_agreement").
        layer_budget: What of each layer is kept at least: a keep rate, or {"0-9": 1.0, "10-29": 0.9}. After every step
            the logits of a layer below it are raised by one number.
        conflict_only: Only what goes against the safety vector is removed, the rest of the task vectors is kept.
        orthogonal: Before export the removal is made orthogonal to the task loss's gradient (`resafe.realign.learn`).
        base: The model before alignment, for the safety vector aligned − base; an aligned adapter's own by default.
        unaligned: The aligned model after harmful tuning, for the safety vector aligned − unaligned.
        logits: Precision of the logits; bfloat16 with stochastic rounding (extra `lowbit`).
        step_in_backward: Step every tensor in the backward pass and free its gradient.
        fused: Form every masked weight in one pass compiled by torch.compile: "auto" on CUDA only, "on", "off".
        seed: Of the mask's training alone (order and composition of the batches, draws); the problem's by default.
            Masks learnt with several seeds can be averaged.

    Raises:
        InputError: A setting is out of its range, or is used by nothing.
    """
    for name, value in {"keep": keep, "warm_share": warm_share or 0.0}.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value:g}, and is a share", "give a number from 0 to 1")
    if isinstance(answer_tokens, int) and answer_tokens < 1:
        raise InputError(f"answer_tokens is {answer_tokens}", "give 1 or more, or all, or leave it out")
    check_strengths(strengths)
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
        seed=problem.seed if seed is None else seed,
        **_given(
            loss=loss, steps=steps, learning_rate=learning_rate, batch_size=batch_size, beta=beta,
            reference=reference, shares=shares, removal_price=removal_price, task_divergence=task_divergence,
            label_smoothing=label_smoothing, layer_budget=layer_budget,
        ),
    )  # fmt: skip
    share = chosen.warm_share if warm_share is None else warm_share
    kept = next(value for value in (warm_kept, initial, chosen.warm_kept) if value is not None)
    warm = WarmStart(share, warm_removed, kept, scores=warm_scores) if share > 0 else None
    tokens = None if answer_tokens == "all" else answer_tokens or chosen.answer_tokens
    engine = EngineSettings(
        gradient_checkpointing, storage, optimizer, report_to,
        preset != "paper" if share_prompts is None else share_prompts, logits, step_in_backward, fused,
    )  # fmt: skip
    if layer_budget is not None and ((export or chosen.export) != "soft" or orthogonal):
        raise InputError(
            "layer_budget holds the mask as it is learnt, which the export changes",
            "use export soft, and leave orthogonal out",
        )
    needed = conflict_only or (warm is not None and warm_scores == "sign_agreement")
    if (base or unaligned) and not needed:
        raise InputError(
            "base and unaligned are used by conflict_only and warm_scores sign_agreement",
            "set one of those (the latter with a warm_share), or leave them out",
        )
    limits = Limits(safety_vector(problem, base, unaligned) if needed else None, conflict_only, orthogonal)
    trained = train_mask(problem, settings, training, export or chosen.export, keep, warm, tokens, engine, limits)
    return mask_family(problem, trained, strengths, shuffle=shuffle)
