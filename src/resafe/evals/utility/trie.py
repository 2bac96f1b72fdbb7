"""Log-likelihoods of many continuations, each shared beginning computed once. Knows tokens, and no text and no task.

The answers of a question, and often the questions of a passage, begin alike. Their sequences become a tree of tokens;
a tree is one row for the model: a token's position is its depth, and it attends to its ancestors only. The numbers
are those of the separate sequences, up to rounding. Rows of like length run together, and the output layer sees only
the positions that predict a continuation's token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from resafe.checkpoints.output import output_of
from resafe.evals.kvcache import can_share_prefix

Sequences = Sequence[tuple[Sequence[int], int]]
"""Token ids of context and continuation together, and how many of the last are the continuation."""

_MIN_SHARED = 6  # tokens: a sequence joins a row only where this much of it is there already
_SHORT_ROW = 768  # tokens: rows may grow to this, or to twice a longer sequence; attention grows with the square
_CPU_TOKENS, _GPU_TOKENS = 1536, 16384  # of a batch
_PREDICTED = 1024  # positions of a batch whose logits are computed together: bounds memory (vocabulary × 4 bytes each)


@dataclass
class Row:
    """A tree of tokens, in an order in which parents come first.

    Attributes:
        tokens: Token ids.
        parents: Place of each token's parent in the row; -1 for a first token.
        depths: Position of each token in its own sequence.
        members: (sequence, [(place of the predicting token, predicted token)]) for each sequence of the row.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    members: list[tuple[int, list[tuple[int, int]]]] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)

    def shared(self, ids: Sequence[int]) -> int:
        """How many first tokens of `ids` the row holds already."""
        place = -1
        for count, token in enumerate(ids):
            place = self.children.get((place, token), -2)
            if place == -2:
                return count
        return len(ids)

    def add(self, index: int, ids: Sequence[int], continuation: int) -> None:
        """Adds a sequence; its last token is predicted and never an input."""
        place, path = -1, []
        for depth, token in enumerate(ids[:-1]):
            step = self.children.get((place, token))
            if step is None:
                step = len(self.tokens)
                self.children[(place, token)] = step
                self.tokens.append(token)
                self.parents.append(place)
                self.depths.append(depth)
            path.append(step)
            place = step
        first = len(ids) - 1 - continuation
        self.members.append((index, list(zip(path[first:], ids[-continuation:], strict=True))))


def build_rows(sequences: Sequences) -> list[Row]:
    """Sequences in their order as rows; one joins the row before it where enough of it is there and there is room."""
    rows: list[Row] = []
    for index, (ids, continuation) in enumerate(sequences):
        row = rows[-1] if rows else None
        shared = row.shared(ids[:-1]) if row else 0
        room = max(_SHORT_ROW, 2 * len(ids))
        if row is None or shared < min(_MIN_SHARED, len(ids) - 1) or len(row.tokens) + len(ids) - shared > room:
            row = Row()
            rows.append(row)
        row.add(index, ids, continuation)
    return rows


def can_use_rows(model: Any) -> bool:
    """Whether a model takes positions and any mask: attention to everything, computed by torch or as plain products."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    takes = "position_ids" in inspect.signature(inner.forward).parameters
    kind = getattr(inner.config, "_attn_implementation", None)
    return takes and kind in ("sdpa", "eager") and can_share_prefix(inner.config)


@torch.inference_mode()
def loglikelihoods(
    model: Any, sequences: Sequences, progress: Callable[[int], None] | None = None
) -> list[tuple[float, bool]]:
    """Scores continuations.

    Args:
        model: A causal language model for which `can_use_rows` holds, in evaluation mode.
        sequences: Each of at least two tokens, of which at least the first is context.
        progress: Called with how many sequences were done since the last call.

    Returns:
        For each sequence the sum of its continuation's log-probabilities in nats (float32, as in lm-eval), and whether
        every token of it is the most likely one.
    """
    results: list[tuple[float, bool]] = [(0.0, False)] * len(sequences)
    budget = _CPU_TOKENS if model.device.type == "cpu" else _GPU_TOKENS
    for batch in _batches(build_rows(sequences), budget):
        places = [[step for _, path in row.members for step, _ in path] for row in batch]
        # A position predicts for each branch below it; its logits are computed once.
        chosen = [sorted(set(row)) for row in places]
        logits = _logits(model, batch, chosen)
        start = 0
        for row, wanted in zip(batch, chosen, strict=True):
            at = {place: start + offset for offset, place in enumerate(wanted)}
            for index, path in row.members:
                picks = torch.tensor([at[place] for place, _ in path], device=logits.values.device)
                tokens = torch.tensor([token for _, token in path], device=logits.values.device)
                results[index] = logits.score(picks, tokens)
            start += len(wanted)
        if progress is not None:
            progress(sum(len(row.members) for row in batch))
    return results


@dataclass
class _Logits:
    """Log-probabilities of chosen positions, without the table of them: logits, their normaliser and best token."""

    values: torch.Tensor
    normaliser: torch.Tensor
    best: torch.Tensor

    def score(self, picks: torch.Tensor, tokens: torch.Tensor) -> tuple[float, bool]:
        chosen = self.values[picks, tokens].float() - self.normaliser[picks]
        return float(chosen.sum()), bool((self.best[picks] == tokens).all())


def _logits(model: Any, batch: list[Row], chosen: list[list[int]]) -> _Logits:
    width = max(len(row.tokens) for row in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    positions = torch.zeros((len(batch), width), dtype=torch.long)
    seen = torch.eye(width, dtype=torch.bool).repeat(len(batch), 1, 1)
    for number, row in enumerate(batch):
        length = len(row.tokens)
        ids[number, :length] = torch.tensor(row.tokens)
        positions[number, :length] = torch.tensor(row.depths)
        table = seen[number]
        for place, parent in enumerate(row.parents):
            if parent >= 0:
                table[place] |= table[parent]
    flat = torch.tensor([number * width + place for number, places in enumerate(chosen) for place in places])
    dtype, device = model.dtype, model.device
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None].to(device)
    flat = flat.to(device)
    with output_of(model, lambda hidden: hidden.flatten(0, 1)[flat]):
        output = model(
            input_ids=ids.to(device), attention_mask=mask, position_ids=positions.to(device), use_cache=False
        )
    values = output.logits[0]
    normaliser = torch.cat([torch.logsumexp(part.float(), -1) for part in values.split(256)])
    return _Logits(values, normaliser, values.argmax(-1))


def _batches(rows: list[Row], budget: int) -> Iterator[list[Row]]:
    """Rows by falling length, so that the largest batch comes first; each within the budgets."""
    batch: list[Row] = []
    predicted = 0
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        count = len({place for _, path in row.members for place, _ in path})
        full = (len(batch) + 1) * max(len((batch or [row])[0].tokens), 1) > budget or predicted + count > _PREDICTED
        if batch and full:
            yield batch
            batch, predicted = [], 0
        batch.append(row)
        predicted += count
    if batch:
        yield batch
