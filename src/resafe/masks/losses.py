"""Log-probabilities of answers and the losses that train a mask. Knows nothing of masks.

"sft" is the chosen answers' negative log-likelihood; "distill" the divergence from the models themselves, each where it
has it right (this project; word-level distillation as in Hinton et al., arXiv 1503.02531), in place of labels.
Preference losses carry TRL's names: sigmoid (Rafailov et al., arXiv 2305.18290, eq. 7), robust (the same for labels of
which a share is wrong, arXiv 2403.00409, eq. 11), ipo (arXiv 2310.12036, eq. 17, with length-averaged log-probabilities
as in TRL), hinge (SLiC, arXiv 2305.10425), exo_pair (arXiv 2402.00856, eq. 16), nca_pair (arXiv 2402.05369, eq. 12),
sppo_hard (arXiv 2405.00675, eq. 4.7), apo_zero and apo_down (arXiv 2408.06266, eq. 7 and
8), bco_pair (arXiv 2404.04656, without its running shift, as TRL's), sigmoid_norm (sigmoid, length-averaged), discopop
(arXiv 2406.08414, eq. 5, at its τ of 0.05), aot and aot_unpaired (arXiv 2406.05882: the distributions over a batch are
compared quantile by quantile, so all its pairs have to be given at once).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import logsigmoid

from resafe.checkpoints.attention import short_attention
from resafe.checkpoints.output import output_of

LossName = Literal[
    "sft",
    "distill",
    "sigmoid",
    "sigmoid_norm",
    "robust",
    "ipo",
    "hinge",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "aot",
    "aot_unpaired",
]
AVERAGED = ("ipo", "sigmoid_norm")
"""Losses of log-probabilities averaged over an answer's tokens, as TRL has them."""

SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Losses in which ε, the share of labels that are taken to be wrong, counts; exo_pair needs one above 0."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of a prompt, as the model sees it, and of one answer with its end-of-turn token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class Share(Protocol):
    """This process's share of a batch that several compute together (see `resafe.masks.processes`)."""

    @property
    def world(self) -> int:
        """How many processes there are."""
        ...

    def rows(self, rows: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], bool]:
        """Its rows of a pass, and whether they count."""
        ...

    def everywhere(self, own: Tensor) -> Tensor:
        """The sum over all processes."""
        ...


UNPADDED = "resafe_unpadded"
"""An attribute of models: true where their sequences are computed one at a time (see `resafe.masks.padding`)."""

PASS_COST = 64
"""What one more pass through the model costs beside its tokens, in tokens (measured with adapters on two cores)."""


def answer_log_probabilities(
    model: Any, sequences: Sequence[Encoded], pad_id: int, pass_cost: float = PASS_COST, share: Share | None = None
) -> tuple[Tensor, Tensor]:
    """Σ log p(answer | prompt) of each sequence.

    Short and long sequences go through the model apart where that saves more padding than another pass costs: a batch
    of refusals and task examples is otherwise half padding.

    Args:
        model: A causal LM of transformers.
        sequences: The batch.
        pad_id: Token for padding; masked, so its value does not matter.
        pass_cost: Cost of one more pass, in tokens.
        share: Of several processes, this one's share of the work; None does all of it.

    Returns:
        Log-probabilities in nats, shape (batch,), float32, and the answers' lengths in tokens, shape (batch,).
    """
    sizes = [len(sequence) for sequence in sequences]
    groups = length_groups(sizes, pass_cost)
    if share is not None and share.world > 1:
        return _shared(model, sequences, pad_id, groups, share)
    sums = [_sums(model, [sequences[row] for row in group], pad_id) for group in groups]
    rows = torch.tensor([row for group in groups for row in group], device=sums[0].device)
    lengths = torch.tensor([len(sequence.answer) for sequence in sequences], device=rows.device)
    return torch.cat(sums)[rows.argsort()], lengths


def _shared(
    model: Any, sequences: Sequence[Encoded], pad_id: int, groups: Sequence[Sequence[int]], share: Share
) -> tuple[Tensor, Tensor]:
    """The same with the rows of each pass dealt out to the processes; the values of all reach every one of them."""
    device = next(model.parameters()).device
    own = torch.zeros(len(sequences), device=device)
    for group in groups:
        rows, counted = share.rows(group, [len(sequence) for sequence in sequences])
        sums = _sums(model, [sequences[row] for row in rows], pad_id)
        own = own.index_add(0, torch.tensor(rows, device=device), sums if counted else 0 * sums)
    return share.everywhere(own), torch.tensor([len(sequence.answer) for sequence in sequences], device=device)


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


def answer_logits(model: Any, sequences: Sequence[Encoded], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of all answers' tokens, in one forward pass, or in one a sequence for models that mind padding.

    Sequences are padded on the left, so that all answers end at the last position; prompts cost no vocabulary-sized
    work.

    Args:
        model: A causal LM of transformers.
        sequences: The batch.
        pad_id: Token for padding.

    Returns:
        Logits, shape (tokens, vocabulary), float32; the tokens that they should predict, and the sequence of each
        token, shape (tokens,).
    """
    if len(sequences) > 1 and getattr(model, UNPADDED, False):
        each = [answer_logits(model, [sequence], pad_id) for sequence in sequences]
        rows = torch.cat([torch.full_like(own, row) for row, (_, _, own) in enumerate(each)])
        return torch.cat([one[0] for one in each]), torch.cat([one[1] for one in each]), rows
    logits, tokens, rows = _passed(model, sequences, pad_id, lambda states: states)
    return logits.float(), tokens, rows


def answer_states(model: Any, sequences: Sequence[Encoded], pad_id: int) -> Tensor:
    """Last hidden states from which the answers' tokens are predicted, as the output layer gets them.

    Args:
        model: A causal LM of transformers.
        sequences: The batch, padded or one at a time as in `answer_logits`.
        pad_id: Token for padding.

    Returns:
        Shape (tokens, width), in the dtype that the model computes in; the tokens' order is that of `answer_logits`.

    Raises:
        ValueError: The model has its output layer compute more than once.
    """
    if len(sequences) > 1 and getattr(model, UNPADDED, False):
        return torch.cat([answer_states(model, [sequence], pad_id) for sequence in sequences])
    entered: list[Tensor] = []

    def enter(states: Tensor) -> Tensor:
        entered.append(states)
        return states[:0]  # nothing vocabulary-sized is asked for

    _passed(model, sequences, pad_id, enter)
    (found,) = entered
    return found


def _passed(
    model: Any, sequences: Sequence[Encoded], pad_id: int, enter: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass of a batch: logits of the states that `enter` lets into the output layer, and tokens and rows of all."""
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
    with short_attention(model, width), output_of(model, lambda hidden: enter(hidden[:, -tail - 1 : -1][wanted])):
        logits = model(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False).logits[0]
    return logits, ids[:, -tail:][wanted], wanted.nonzero()[:, 0]


def _sums(model: Any, sequences: Sequence[Encoded], pad_id: int) -> Tensor:
    """Σ log p(answer | prompt) of each sequence in one forward pass, shape (batch,)."""
    logits, tokens, rows = answer_logits(model, sequences, pad_id)
    picked = -functional.cross_entropy(logits, tokens, reduction="none")
    return torch.zeros(len(sequences), device=rows.device).index_add(0, rows, picked)


def token_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(π_ref ‖ π) of each token in nats, shape (tokens,).

    Args:
        reference: Logits of π_ref, shape (tokens, vocabulary).
        logits: Logits of π, same shape.
    """
    found = functional.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none")
    return found.sum(-1)


DISCOPOP_TAU = 0.05
"""τ of "discopop": how sharply it goes over from one loss to the other (the paper's value, and TRL's default)."""

PairLoss = Callable[[Tensor, Tensor, float, float], Tensor]
"""log π/π_ref of the chosen and of the rejected answers, β, ε → loss of each pair, all of shape (pairs,).

What "aot" compares instead: see `preference_loss`."""


def _robust(won: Tensor, lost: Tensor, beta: float, wrong: float) -> Tensor:
    right, flipped = logsigmoid(beta * (won - lost)), logsigmoid(beta * (lost - won))
    return -((1 - wrong) * right - wrong * flipped) / (1 - 2 * wrong)


def _exo_pair(won: Tensor, lost: Tensor, beta: float, wrong: float) -> Tensor:
    """KL of the policy's preference from labels that are right with probability 1 − ε."""
    right, flipped = logsigmoid(beta * (won - lost)), logsigmoid(beta * (lost - won))
    return right.exp() * (right - math.log1p(-wrong)) + flipped.exp() * (flipped - math.log(wrong))


def _discopop(won: Tensor, lost: Tensor, beta: float, _: float) -> Tensor:
    """Logistic where the margin is below zero, exponential above, mixed in between."""
    margin = beta * (won - lost)
    above = margin / DISCOPOP_TAU
    # e^(−margin) overflows where its weight σ(above) is 0, and their product does not.
    return -logsigmoid(margin) * torch.sigmoid(-above) + (logsigmoid(above) - margin).exp()


def _smoothed_quantiles(higher: Tensor, lower: Tensor, beta: float, wrong: float) -> Tensor:
    """The k-th lowest of what should be higher against the k-th lowest of the other, for every k."""
    margin = beta * (higher.sort().values - lower.sort().values)
    return -(1 - wrong) * logsigmoid(margin) - wrong * logsigmoid(-margin)


def _nca_pair(won: Tensor, lost: Tensor, beta: float, wrong: float) -> Tensor:
    return -logsigmoid(beta * won) - (logsigmoid(-beta * won) + logsigmoid(-beta * lost)) / 2


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": lambda won, lost, beta, _: -logsigmoid(beta * (won - lost)),
    "sigmoid_norm": lambda won, lost, beta, _: -logsigmoid(beta * (won - lost)),
    "robust": _robust,
    "ipo": lambda won, lost, beta, _: (won - lost - 1 / (2 * beta)) ** 2,
    "hinge": lambda won, lost, beta, _: torch.relu(1 - beta * (won - lost)),
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": lambda won, lost, beta, _: -logsigmoid(beta * won) - logsigmoid(-beta * lost),
    "sppo_hard": lambda won, lost, beta, _: (won - 1 / (2 * beta)) ** 2 + (lost + 1 / (2 * beta)) ** 2,
    "apo_zero": lambda won, lost, beta, _: torch.sigmoid(-beta * won) + torch.sigmoid(beta * lost),
    "apo_down": lambda won, lost, beta, _: torch.sigmoid(beta * won) + torch.sigmoid(beta * (lost - won)),
    "discopop": _discopop,
    "aot": _smoothed_quantiles,
    "aot_unpaired": _smoothed_quantiles,
}


def preference_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float, name: LossName,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The preference loss of each pair, and its reward margin β((π_c − ref_c) − (π_r − ref_r)).

    "aot" and "aot_unpaired" sort within the batch: they need all its pairs in one call, and their losses are those of
    ranks, not of pairs. "aot" compares log π(chosen)/π(rejected) of the policy with that of the reference,
    "aot_unpaired" log π/π_ref of the chosen answers with that of the rejected ones.

    Args:
        chosen: log π(chosen), shape (pairs,); length-averaged for `AVERAGED` losses.
        rejected: log π(rejected), shape (pairs,).
        reference_chosen: log π_ref(chosen), shape (pairs,).
        reference_rejected: log π_ref(rejected), shape (pairs,).
        beta: β.
        name: Any `LossName` but "sft" and "distill".
        label_smoothing: ε of `SMOOTHED` losses, below ½.

    Returns:
        Losses and margins, shape (pairs,).
    """
    if name not in PAIR_LOSSES:
        raise ValueError(f"{name} is no preference loss")
    won, lost = chosen - reference_chosen, rejected - reference_rejected
    margins = (beta * (won - lost)).detach()
    if name == "aot":
        won, lost = chosen - rejected, reference_chosen - reference_rejected
    return PAIR_LOSSES[name](won, lost, beta, label_smoothing), margins
