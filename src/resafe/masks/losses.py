"""Log-probabilities of answers and the losses that train a mask. Knows nothing of masks.

DPO losses carry TRL's names: sigmoid (Rafailov et al., arXiv 2305.18290, eq. 7), ipo (arXiv 2310.12036, eq. 17,
with length-averaged log-probabilities as in TRL) and hinge (SLiC, arXiv 2305.10425).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from resafe.checkpoints.attention import short_attention
from resafe.checkpoints.output import output_of

LossName = Literal["sft", "sigmoid", "ipo", "hinge"]


@dataclass(frozen=True)
class Encoded:
    """Tokens of a prompt, as the model sees it, and of one answer with its end-of-turn token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


PASS_COST = 64
"""What one more pass through the model costs beside its tokens, in tokens (measured with adapters on two cores)."""


def answer_log_probabilities(
    model: Any, sequences: Sequence[Encoded], pad_id: int, pass_cost: float = PASS_COST
) -> tuple[Tensor, Tensor]:
    """Σ log p(answer | prompt) of each sequence.

    Short and long sequences go through the model apart where that saves more padding than another pass costs: a batch
    of refusals and task examples is otherwise half padding.

    Args:
        model: A causal LM of transformers.
        sequences: The batch.
        pad_id: Token for padding; masked, so its value does not matter.
        pass_cost: Cost of one more pass, in tokens.

    Returns:
        Log-probabilities in nats, shape (batch,), float32, and the answers' lengths in tokens, shape (batch,).
    """
    groups = length_groups([len(sequence) for sequence in sequences], pass_cost)
    sums = [_sums(model, [sequences[row] for row in group], pad_id) for group in groups]
    rows = torch.tensor([row for group in groups for row in group], device=sums[0].device)
    lengths = torch.tensor([len(sequence.answer) for sequence in sequences], device=rows.device)
    return torch.cat(sums)[rows.argsort()], lengths


def length_groups(lengths: Sequence[int], pass_cost: float) -> list[list[int]]:
    """Rows in the groups by length that cost least: Σ over groups of rows · longest + `pass_cost`.

    Exact, by dynamic programming over the rows sorted by length.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    cost, cut = [0.0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        options = [cost[start] + (end - start) * longest + pass_cost for start in range(end)]
        cut.append(min(range(end), key=options.__getitem__))
        cost.append(options[cut[end]])
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(sorted(order[cut[end] : end]))
        end = cut[end]
    return groups[::-1]


def _sums(model: Any, sequences: Sequence[Encoded], pad_id: int) -> Tensor:
    """Σ log p(answer | prompt) of each sequence in one forward pass, shape (batch,).

    Sequences are padded on the left, so that all answers end at the last position; prompts cost no vocabulary-sized
    work.
    """
    width = max(len(sequence) for sequence in sequences)
    tail = max(len(sequence.answer) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    wanted = torch.zeros((len(sequences), tail), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence.prompt + sequence.answer)
        attention[row, width - len(sequence) :] = 1
        wanted[row, tail - len(sequence.answer) :] = True
    device = next(model.parameters()).device
    ids, attention, wanted = ids.to(device), attention.to(device), wanted.to(device)
    positions = (attention.cumsum(1) - 1).clamp_min(0)
    with short_attention(model, width), output_of(model, lambda hidden: hidden[:, -tail - 1 : -1][wanted]):
        logits = model(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False).logits[0]
    picked = -functional.cross_entropy(logits.float(), ids[:, -tail:][wanted], reduction="none")
    rows = wanted.nonzero()[:, 0]
    return torch.zeros(len(sequences), device=device).index_add(0, rows, picked)


def preference_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float, name: LossName
) -> tuple[Tensor, Tensor]:
    """The preference loss of each pair, and its reward margin β((π_c − ref_c) − (π_r − ref_r)).

    Args:
        chosen: log π(chosen), shape (pairs,); length-averaged for "ipo".
        rejected: log π(rejected), shape (pairs,).
        reference_chosen: log π_ref(chosen), shape (pairs,).
        reference_rejected: log π_ref(rejected), shape (pairs,).
        beta: β.
        name: "sigmoid", "ipo" or "hinge".

    Returns:
        Losses and margins, shape (pairs,).
    """
    difference = (chosen - reference_chosen) - (rejected - reference_rejected)
    if name == "sigmoid":
        losses = -functional.logsigmoid(beta * difference)
    elif name == "ipo":
        losses = (difference - 1 / (2 * beta)) ** 2
    elif name == "hinge":
        losses = torch.relu(1 - beta * difference)
    else:
        raise ValueError(f"{name} is no preference loss")
    return losses, (beta * difference).detach()
