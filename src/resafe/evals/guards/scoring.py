"""Runs guard models over rendered texts, batched by length. Knows no prompt format and no judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from resafe.checkpoints.output import output_of


def yes_or_no(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int) -> list[float | None]:
    """P(yes) / (P(yes) + P(no)) of the first token after each text; None where the likeliest token is neither.

    Every token that spells the word counts, in any case and with or without a space before it.
    """
    words = _spelled(tokenizer, ("yes", "no"))

    def step(ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, last: torch.Tensor) -> list[float | None]:
        with output_of(model, lambda hidden: hidden[rows, last]):
            logits = model(input_ids=ids, attention_mask=mask).logits[0].float()
        yes, no = (logits[:, torch.tensor(found, device=logits.device)].logsumexp(-1) for found in words)
        either = set(words[0]) | set(words[1])
        share = torch.sigmoid(yes - no).tolist()
        return [p if top in either else None for p, top in zip(share, logits.argmax(-1).tolist(), strict=True)]

    return _batched(model, tokenizer, texts, batch_size, step)


def head_scores(model: Any, head: Any, tokenizer: Any, texts: Sequence[str], batch_size: int) -> list[list[float]]:
    """The outputs of a linear head on the last token's hidden state, (outputs,) for each text, in float32.

    Args:
        model: A transformer without a head.
        head: From hidden states (rows, width) to outputs (rows, outputs).
        tokenizer: Its tokenizer.
        texts: Rendered, with their special tokens.
        batch_size: Texts that run together.
    """

    def step(ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, last: torch.Tensor) -> list[list[float]]:
        hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        found: list[list[float]] = head(hidden[rows, last]).float().tolist()
        return found

    return _batched(model, tokenizer, texts, batch_size, step)


def _batched(
    model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int, step: Callable[..., list[Any]]
) -> list[Any]:
    """Runs `step` over batches of similar length, padded on the right; results in the order of the texts."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    order = sorted(range(len(encoded)), key=lambda place: -len(encoded[place]))
    results: list[Any] = [None] * len(encoded)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            lengths = torch.tensor([len(encoded[place]) for place in places])
            ids = torch.full((len(places), int(lengths.max())), tokenizer.pad_token_id or 0)
            for row, place in enumerate(places):
                ids[row, : lengths[row]] = torch.tensor(encoded[place])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            device = model.device
            rows = torch.arange(len(places), device=device)
            found = step(ids.to(device), mask.to(device), rows, (lengths - 1).to(device))
            for place, result in zip(places, found, strict=True):
                results[place] = result
    return results


def _spelled(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """Token ids of each word, however it is written."""
    found: dict[str, list[int]] = {word: [] for word in words}
    for token, number in tokenizer.get_vocab().items():
        word = token.strip("▁Ġ \u010a").lower()
        if word in found:
            found[word].append(number)
    return [sorted(found[word]) for word in words]
