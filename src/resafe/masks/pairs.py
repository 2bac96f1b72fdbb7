"""Log-probabilities of both answers of pairs, with the prompt that they share computed once.

One sequence a pair: prompt, chosen, rejected. The rejected answer attends to the prompt and itself, at the positions
that it would have after the prompt. Exact for models of attention that reaches back over all of it; whether one's does
is read off its configuration and tried out (see `shares_prompts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from resafe.checkpoints.attention import short_attention
from resafe.checkpoints.output import output_of
from resafe.masks.losses import PASS_COST, Encoded, Share, answer_log_probabilities, length_groups

Pairs = Sequence[tuple[Encoded, Encoded]]

_WINDOWS = (("sliding_window", "sliding"), ("attention_chunk_size", "chunked"))  # setting, and in a layer's type


def pair_log_probabilities(
    model: Any, pairs: Pairs, pad_id: int, pass_cost: float = PASS_COST, share: Share | None = None
) -> Tensor:
    """Σ log p(answer | prompt) of (chosen, rejected), shape (pairs, 2), float32.

    Args:
        model: A causal LM of transformers in which only attention mixes positions.
        pairs: Chosen and rejected answers with equal prompts.
        pad_id: Token for padding.
        pass_cost: Cost of one more pass, in tokens.
        share: Of several processes, this one's share of the work; None does all of it.
    """
    lengths = [_length(pair) for pair in pairs]
    device = next(model.parameters()).device
    own = torch.zeros(len(pairs), 2, device=device)
    for group in length_groups(lengths, pass_cost):
        rows, counted = (list(group), True) if share is None else share.rows(group, lengths)
        sums = _sums(model, [pairs[row] for row in rows], pad_id)
        own = own.index_add(0, torch.tensor(rows, device=device), sums if counted else 0 * sums)
    return own if share is None else share.everywhere(own)


def shares_prompts(model: Any, pairs: Pairs, pad_id: int) -> bool:
    """Whether a model gives both answers the same log-probabilities with the shared prompt as with one each.

    A model whose layers carry state along the sequence does not, nor one that takes no mask of whole positions. Where a
    window of its attention is shorter than the longest prompt with its answer, it does not either: a mask of whole
    positions takes the window's place, and what fits into it would not show that. Tried out on the first pair and on
    the longest.
    """
    longest = max(pairs, key=_length)
    window = attention_window(getattr(model, "config", None))
    if window is not None and window < max(len(answer) for pair in pairs for answer in pair):
        return False
    return all(_shares(model, pair, pad_id) for pair in dict.fromkeys((pairs[0], longest)))


def attention_window(config: Any) -> int | None:
    """Positions in the narrowest window or chunk of a model's layers; None where its configuration names none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None)
    found = []
    for setting, kind in _WINDOWS:
        size = getattr(text, setting, None)
        used = (
            any(kind in layer for layer in kinds) if kinds else getattr(text, "use_sliding_window", True) is not False
        )
        if isinstance(size, int) and size > 0 and used:
            found.append(size)
    return min(found, default=None)


def _length(pair: tuple[Encoded, Encoded]) -> int:
    """Of the one sequence that both answers make behind their prompt."""
    return len(pair[0]) + len(pair[1].answer)


def _shares(model: Any, pair: tuple[Encoded, Encoded], pad_id: int) -> bool:
    kind = next(model.parameters()).dtype
    with torch.no_grad():
        wanted, _ = answer_log_probabilities(model, list(pair), pad_id)
        try:
            found = pair_log_probabilities(model, [pair], pad_id)[0]
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
    bound = 1e-3 if kind == torch.float32 else 0.05
    return bool(torch.allclose(found, wanted, rtol=bound, atol=bound))


def _sums(model: Any, pairs: Pairs, pad_id: int) -> Tensor:
    width = max(_length(pair) for pair in pairs)
    ids = torch.full((len(pairs), width), pad_id, dtype=torch.long)
    positions = torch.zeros_like(ids)
    seen = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(pairs), 1, 1)
    rows, places, tokens, slots = [], [], [], []
    for row, (chosen, rejected) in enumerate(pairs):
        prompt, first, second = len(chosen.prompt), len(chosen.answer), len(rejected.answer)
        cut, end = prompt + first, prompt + first + second
        ids[row, :end] = torch.tensor(chosen.prompt + chosen.answer + rejected.answer)
        positions[row, :cut] = torch.arange(cut)
        positions[row, cut:end] = torch.arange(prompt, prompt + second)
        seen[row, cut:end, prompt:cut] = False
        rows += [row] * (first + second)
        # a token is predicted at the one before it, and both answers' first ones at the prompt's last
        places += [*range(prompt - 1, cut - 1), prompt - 1, *range(cut, end - 1)]
        tokens += [*chosen.answer, *rejected.answer]
        slots += [2 * row] * first + [2 * row + 1] * second
    weight = next(model.parameters())
    device, kind = weight.device, weight.dtype
    mask = torch.zeros(seen.shape, dtype=kind, device=device).masked_fill_(~seen.to(device), torch.finfo(kind).min)
    at = torch.tensor([rows, places], device=device)
    with short_attention(model, width), output_of(model, lambda hidden: hidden[at[0], at[1]]):
        logits = model(
            input_ids=ids.to(device), attention_mask=mask[:, None], position_ids=positions.to(device), use_cache=False
        ).logits[0]
    picked = -functional.cross_entropy(logits.float(), torch.tensor(tokens, device=device), reduction="none")
    sums = torch.zeros(2 * len(pairs), device=device).index_add(0, torch.tensor(slots, device=device), picked)
    return sums.view(len(pairs), 2)
