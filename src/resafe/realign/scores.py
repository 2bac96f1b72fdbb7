"""First-order removal scores: how much the loss falls when an entry of the task vectors is removed.

With a mask m on the task vectors, removing entry i changes a loss L by −∂L/∂m_i at m = 1, to first order. One pass
over a few dozen examples gives these derivatives; nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from resafe.deltas import origins
from resafe.errors import InputError, ResafeError
from resafe.fusion import Fusion
from resafe.masks import MaskLogits, MaskSettings, encode_items, install_masks
from resafe.masks.batches import SIDES, Item
from resafe.masks.concrete import has_heads
from resafe.masks.logits import held_here, placed_as
from resafe.masks.losses import answer_log_probabilities
from resafe.masks.processes import ALONE, Processes
from resafe.realign.base import Problem
from resafe.realign.orthogonal import orthogonal_scores

_BATCH = 16


def masked_model(
    problem: Problem,
    settings: MaskSettings,
    seed: int,
    storage: torch.dtype = torch.float32,
    apart: bool = False,
    device: str | None = None,
) -> tuple[Any, MaskLogits]:
    """A fresh model with the problem's task vectors behind masks, and the masks' logits, on a device (the run's).

    F's first pass over the whole model (TIES' thresholds) is taken over the task vectors as they are masked, as the
    published loop does and as it is where the mask is applied, and not once over the unmasked ones. `apart` as in
    `install_masks`.
    """
    fusion: Fusion = problem.fusion

    def fitted(read: Callable[[str], Sequence[Tensor]]) -> Callable[[str, Sequence[Tensor]], Tensor]:
        statistics = fusion.statistics(problem.names, read)
        return lambda name, deltas: fusion.combine(name, deltas, statistics)

    source = problem.models()
    model = source.plain() if device is None else source.plain(device)
    logits = install_masks(
        model,
        problem.vectors,
        settings,
        seed=seed,
        combine=fusion.combine,
        linear=fusion.linear,
        additive=fusion.additive,
        by_entry=fusion.weighted_sum,
        refit=fitted if fusion.rounds("model") > 0 else None,
        storage=storage,
        apart=apart,
    )
    return model, logits


def with_head_size(settings: MaskSettings, problem: Problem) -> MaskSettings:
    """The settings with the width of the aligned model's attention heads, where the granularity needs it.

    Raises:
        InputError: The model's configuration does not tell it, or no tensor of the task vectors is known to have heads.
    """
    if settings.granularity != "head":
        return settings
    size, vector = settings.head_size or _head_size(problem), problem.vectors[0]
    if not any(has_heads(name, tuple(vector.shape(name)), size) for name in vector.names):
        raise InputError(
            "granularity head: no tensor of the task vectors is one whose heads are known, so that each would have one "
            "value",
            "use granularity row or entry",
        )
    return replace(settings, head_size=size)


def _head_size(problem: Problem) -> int:
    aligned, _ = origins(problem.vectors[0])
    model = aligned.base if aligned is not None and aligned.kind == "adapter" else aligned
    config = {} if model is None else model.config.get("text_config", model.config)

    def read(*names: str) -> int | None:  # GPT-2, MPT and others have names of their own
        return next((config[name] for name in names if config.get(name)), None)

    heads, width = (
        read("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
        read("hidden_size", "n_embd", "d_model"),
    )
    size = read("head_dim") or (width // heads if heads and width else None)
    if size is None:
        raise InputError(
            "the width of the model's attention heads is not known: its configuration tells neither head_dim nor the "
            "numbers of heads and of hidden units",
            "use granularity row or column",
        )
    return int(size)


def encoded_items(problem: Problem, answer_tokens: int | None = None) -> tuple[list[Item], int]:
    """The problem's pairs (answers cut to `answer_tokens`) and task examples as tokens, and the padding token."""
    source = problem.models()
    items = encode_items(source.tokenizer, source.system, problem.pairs, problem.keep, answer_tokens, problem.keep_of)
    return items, int(source.tokenizer.pad_token_id or 0)


def first_of_each_side(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items of each side, in order."""
    return [i for side in SIDES for i in [i for i in items if i.side == side][:count]]


def mask_gradients(
    model: Any,
    logits: MaskLogits,
    items: Sequence[Item],
    scales: dict[str, float],
    pad_id: int,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Gradient in m of Σ_side w_side · (mean negative log-likelihood per token of the side's items), at the present m.

    Args:
        model: The model with masks installed in "direct" mode.
        logits: Its logits, φ = m.
        items: Encoded items.
        scales: Side → weight.
        pad_id: Padding token.
        progress: Called with (batches done, batches, figures).
        processes: This process among those over which the model is sharded.

    Returns:
        Key → gradient, float32, shape of the logits; sharded as they are.
    """
    sizes = {side: sum(item.side == side for item in items) for side in scales}
    ordered = sorted((item for item in items if scales.get(item.side)), key=lambda item: len(item.chosen))
    batches = [ordered[start : start + _BATCH] for start in range(0, len(ordered), _BATCH)]
    logits.zero_grad(set_to_none=True)
    logits.refresh()
    for number, batch in enumerate(batches):
        sums, lengths = answer_log_probabilities(model, [item.chosen for item in batch], pad_id, share=processes)
        weights = torch.tensor([scales[item.side] / sizes[item.side] for item in batch], device=sums.device)
        loss = (weights * -sums / lengths).sum()
        (loss if processes.world == 1 else loss * processes.world).backward()  # type: ignore[no-untyped-call]
        if progress:
            progress(number + 1, len(batches), {"loss": float(loss.detach())})
    found = {key: torch.zeros_like(p.detach()) if p.grad is None else p.grad for key, p in logits.values.items()}
    logits.zero_grad(set_to_none=True)  # taken over, not copied: they are as large as the model
    return found


def second_order(
    model: Any,
    logits: MaskLogits,
    items: Sequence[Item],
    pad_id: int,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> dict[str, Tensor]:
    """How much the items' mean loss falls when an entry is removed, to second order: ∂L/∂m − ½ F.

    F is the diagonal of the empirical Fisher matrix, in place of the Hessian: n g² for an answer of n tokens whose mean
    negative log-likelihood has the gradient g. Every item is a backward pass of its own.

    Args:
        model: The model with masks installed in "direct" mode.
        logits: Its logits, φ = m.
        items: Encoded items of one side.
        pad_id: Padding token.
        progress: Called with (items done, items, figures).

    Returns:
        Key → score, float32, shape of the logits; for masks near 1.
    """
    found = {key: torch.zeros_like(value) for key, value in logits.values.items()}
    logits.refresh()
    for number, item in enumerate(items):
        logits.zero_grad(set_to_none=True)
        sums, lengths = answer_log_probabilities(model, [item.chosen], pad_id)
        loss = (-sums / lengths).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        for key, value in logits.values.items():
            if value.grad is not None:
                curvature = value.grad.square().mul_(0.5 * float(lengths[0]))
                found[key] += (value.grad - curvature) / len(items)
        if progress:
            progress(number + 1, len(items), {"loss": float(loss.detach())})
    return {key: value.detach() for key, value in found.items()}


def agreed(safety: Tensor, *others: Tensor) -> Tensor:
    """The safety score where no other side's score is negative, zero elsewhere: removal must not hurt another side."""
    own = held_here(safety)
    keeps = torch.stack([held_here(other) >= 0 for other in others]).all(0)
    return placed_as(torch.where(keeps, own, torch.zeros_like(own)), safety)


def removal_scores(
    model: Any,
    logits: MaskLogits,
    items: Sequence[Item],
    examples: int,
    pad_id: int,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    processes: Processes = ALONE,
    fisher: bool = False,
    orthogonal: bool = False,
) -> dict[str, Tensor]:
    """∂L_safety/∂m of every entry whose removal hurts no other side, zero for the others.

    An entry is left alone where ∂L/∂m is negative for the helpful answers to harmless prompts or for the task's own
    examples: its removal would raise that loss, to first order.

    Args:
        model: The model with masks installed in "direct" mode.
        logits: Its logits, φ = m = 1.
        items: Encoded items.
        examples: Items of each side that are used, in order.
        pad_id: Padding token.
        progress: Called with (batches done, batches, figures), anew for each side.
        processes: This process among those over which the model is sharded.
        fisher: Take scores to second order (see `second_order`), by one process.
        orthogonal: In place of sparing every entry that another side needs, take the other sides' scores out of the
            safety scores (see `orthogonal_scores`): the removal as a whole leaves their losses, to first order. By one
            process.

    Returns:
        Key → score, float32, shape of the logits; sharded as they are.
    """
    few = first_of_each_side(items, examples)
    sides = [side for side in SIDES if any(item.side == side for item in few)]
    if fisher:
        by_side = [[item for item in few if item.side == side] for side in sides]
        gradients = [second_order(model, logits, own, pad_id, progress) for own in by_side]
    else:
        gradients = [mask_gradients(model, logits, few, {side: 1.0}, pad_id, progress, processes) for side in sides]
    if len(sides) == 1:
        return gradients[0]
    if orthogonal:
        return orthogonal_scores(gradients[0], gradients[1:])
    return {key: agreed(*(gradient[key] for gradient in gradients)) for key in gradients[0]}


def turned(items: Sequence[Item], by: int) -> list[Item]:
    """The items with each side turned by `by` places, so that the next ones come first."""
    found = []
    for side in SIDES:
        of_side = [item for item in items if item.side == side]
        start = by % len(of_side) if of_side else 0
        found += of_side[start:] + of_side[:start]
    return found


def removal_mask(
    scores: dict[str, Tensor],
    share: float,
    removed: Mapping[str, Tensor] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Zeros at the `share` of all scores with the highest positive ones over the whole model, ones elsewhere.

    Of entries that tie at the threshold so many are taken as make the share, evenly spaced in the order of the scores:
    changes stored in bfloat16 have few magnitudes, and those of the first layers are no better to remove than others.

    Args:
        scores: Key → score, float32; sharded over several processes.
        share: Share of all scores (one an entry, row, rank, …), 0 to 1.
        removed: A mask whose zeros stay removed and count for the share; the rest is filled up by score. By one
            process.
        processes: This process among those that hold the scores.

    Returns:
        Key → mask, float32, sharded as the scores are.

    Raises:
        ResafeError: A score is not a number.
    """
    own = {key: held_here(score) for key, score in scores.items()}
    wrong = next((key for key, part in own.items() if bool(part.isnan().any())), None)
    if not processes.agree(wrong is None):
        where = f"'{wrong}'" if wrong else "another process's shards"
        raise ResafeError(f"the removal scores of {where} hold NaN", "compute them in float32: dtype: float32")
    if removed is not None:
        own = {key: torch.where(removed[key] > 0, part, torch.inf) for key, part in own.items()}
    count = round(share * sum(score.numel() for score in scores.values()))
    threshold = nth_highest(list(own.values()), count, processes) if count else torch.inf
    if not count:
        return {key: placed_as(torch.ones_like(part), scores[key]) for key, part in own.items()}
    masks = {key: part < threshold for key, part in own.items()}
    if threshold < math.inf:  # what is removed already stays so
        _spare_ties(own, masks, threshold, count, processes)
    return {key: placed_as(mask.to(torch.float32), scores[key]) for key, mask in masks.items()}


def _spare_ties(
    scores: Mapping[str, Tensor], masks: dict[str, Tensor], threshold: float, count: int, processes: Processes
) -> None:
    """Keeps so many of the entries that tie at the threshold, evenly spaced, that `count` are removed; in place."""
    device = next(iter(scores.values())).device
    taken = torch.tensor(sum(int((score >= threshold).sum()) for score in scores.values()), device=device)
    surplus = int(processes.everywhere(taken)) - count
    if surplus <= 0:
        return
    ties = torch.zeros(processes.world, dtype=torch.long, device=device)
    ties[processes.rank] = sum(int((score == threshold).sum()) for score in scores.values())
    ties = processes.everywhere(ties)
    spared = torch.arange(surplus) * int(ties.sum()) // surplus - int(ties[: processes.rank].sum())
    for key, score in scores.items():
        tied = (score.flatten() == threshold).nonzero().flatten()
        mine = spared[(spared >= 0) & (spared < len(tied))]
        mask = masks[key].flatten()
        mask[tied[mine.to(tied.device)]] = True
        masks[key] = mask.reshape(score.shape)
        spared = spared - len(tied)


def nth_highest(parts: Sequence[Tensor], count: int, processes: Processes = ALONE) -> float:
    """The positive number that is the `count`-th highest of all, exactly; the smallest normal one if fewer are above.

    Found by halving: positive float32 numbers are ordered as their bits are. So no tensor of all of them is needed,
    neither in one process nor of several.

    Args:
        parts: Float32 tensors without NaN; each process's own.
        count: 1 or more.
        processes: This process among those whose parts count together.
    """

    def value(bits: int) -> float:
        return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))

    low, high = (int(torch.tensor(end).view(torch.int32)) for end in (torch.finfo(torch.float32).tiny, torch.inf))
    while low < high:
        middle = (low + high + 1) // 2
        above = torch.stack([(part >= value(middle)).sum() for part in parts]).sum()
        if int(processes.everywhere(above)) >= count:
            low = middle
        else:
            high = middle - 1
    return value(low)
