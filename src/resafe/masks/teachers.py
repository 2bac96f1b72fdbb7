"""The teachers of distillation: the aligned model on pairs, the tuned ones on task examples. Knows no loss.

They are fixed, so what a training will ask of them is computed once and kept under a digest of its own: the last hidden
states at the answers' positions. Logits are made of them at each step by the model's own output layer, as they are
vocabulary-sized. Models for which that gives other logits than a pass have their teachers pass at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resafe.checkpoints.output import decoder_gives
from resafe.masks.batches import Item
from resafe.masks.logits import MaskLogits, Reading
from resafe.masks.losses import Encoded, answer_logits, answer_states, length_groups
from resafe.masks.processes import ALONE, Processes
from resafe.masks.reference import kept_tensors, made_with, pass_cost, precision_of
from resafe.provenance import digest_value

_FORMAT = 1  # raised when the same models and items give other states, or are tried otherwise
_CHUNK = 32
"""Sequences whose states are computed, and exchanged by several processes, together."""
_UNABLE = (AttributeError, TypeError, ValueError, LookupError, RuntimeError)
"""What a model raises that cannot go on from hidden states."""


class Teachers:
    """What the teachers of items say, from states that are kept or by a pass.

    Args:
        model: The model with masks installed.
        logits: Its logits.
        pad_id: Padding token.
        processes: This process among those that train together.
        progress: Called with (items that a teacher has seen, items, {}), by the main process.
    """

    def __init__(
        self,
        model: Any,
        logits: MaskLogits,
        pad_id: int,
        processes: Processes = ALONE,
        progress: Callable[[int, int, dict[str, float]], None] | None = None,
    ) -> None:
        self._model, self._logits, self._pad_id, self._processes = model, logits, pad_id, processes
        self._progress = progress if processes.main else None
        self._cost = pass_cost(model)
        self._states: dict[tuple[int, Reading], Tensor] = {}

    def of(self, item: Item) -> Reading:
        """The teacher of an item: the aligned model of a pair, of a task example the tuned one that it belongs to.

        What F makes of several tuned models may have lost a task to another, and would teach the masks to keep it lost.
        It is the teacher only where nobody said which model an example belongs to.
        """
        if item.side != "task":
            return "zeros"
        return item.task if self._logits.apart and item.task is not None else "ones"

    @property
    def kept(self) -> int:
        """Of how many items the states are kept; 0 where the teachers pass at every step."""
        return len(self._states)

    def keep(self, items: Iterable[Item], folder: Path | None, models: str) -> None:
        """Has the states of these items ready, from a file in `folder` or computed now and put there.

        All of them are computed or none, so that the numbers do not depend on what another training left there. Where
        the model cannot go on from states that is kept, too, and its teachers pass at every step.

        Args:
            items: What a training will meet.
            folder: Where states are kept for other trainings; None keeps them in memory alone.
            models: What tells the models and their fusion from others (see `reference_digest`).
        """
        met = {item.index: item for item in items}
        needs = sorted(met.values(), key=lambda item: (str(self.of(item)), item.index))
        stored = kept_tensors(
            "teachers", folder, lambda: self._digest(needs, models), lambda: self._computed(needs), self._processes
        )
        if "states" in stored:
            parts = stored["states"].split_with_sizes([len(item.chosen.answer) for item in needs])
            self._states = {(item.index, self.of(item)): part for item, part in zip(needs, parts, strict=True)}

    def _digest(self, needs: Sequence[Item], models: str) -> str:
        tokens = [(self.of(item), item.chosen.prompt, item.chosen.answer) for item in needs]
        vectors, precision = self._logits.vectors_digest, precision_of(self._model)
        return digest_value([_FORMAT, models, vectors, tokens, precision, *made_with(self._model)])

    @torch.no_grad()
    def _computed(self, needs: Sequence[Item]) -> dict[str, Tensor]:
        """The states of all answers' tokens, (tokens, width), on the CPU; none where logits cannot be made of them."""
        shortest_first: dict[Reading, list[int]] = {}
        for place in sorted(range(len(needs)), key=lambda place: len(needs[place].chosen)):
            shortest_first.setdefault(self.of(needs[place]), []).append(place)
        for teacher, places in shortest_first.items():
            ends = [needs[place].chosen for place in dict.fromkeys((places[0], places[-1]))]
            with self._logits.reading(teacher):
                able = goes_on_from_states(self._model, ends, self._pad_id)
            if not self._processes.agree(able):
                return {}
        found: dict[int, Tensor] = {}
        for teacher, places in shortest_first.items():
            with self._logits.reading(teacher):
                for start in range(0, len(places), _CHUNK):
                    chunk = places[start : start + _CHUNK]
                    found |= zip(chunk, self._together([needs[place].chosen for place in chunk]), strict=True)
                    if self._progress:
                        self._progress(len(found), len(needs), {})
        return {"states": torch.cat([found[place] for place in range(len(needs))])} if found else {}

    def _together(self, sequences: Sequence[Encoded]) -> list[Tensor]:
        """The states of each sequence's answer, of which every process computes its share and gets all."""
        lengths, found = [len(sequence) for sequence in sequences], dict[int, Tensor]()
        for group in length_groups(lengths, self._cost):
            rows, counted = self._processes.rows(group, lengths)
            own = answer_states(self._model, [sequences[row] for row in rows], self._pad_id)
            sizes = [len(sequences[row].answer) for row in group]
            # Sums with zeros are exact, and so is the way through float32, as gloo does not add every dtype.
            exchanged = own.new_zeros((sum(sizes), own.shape[1]), dtype=torch.promote_types(own.dtype, torch.float32))
            places = dict(zip(group, exchanged.split_with_sizes(sizes), strict=True))
            for row, part in zip(rows, own.split_with_sizes([len(sequences[row].answer) for row in rows]), strict=True):
                if counted:
                    places[row].copy_(part)
            every = self._processes.everywhere(exchanged).to(own.dtype).cpu()
            found |= zip(group, every.split_with_sizes(sizes), strict=True)
        return [found[row] for row in range(len(sequences))]

    @torch.no_grad()
    def say(self, items: Sequence[Item], rows: Iterable[int]) -> dict[int, Tensor]:
        """The teachers' logits for the answers of some of a batch's items, each by its own teacher.

        Args:
            items: The batch, the same in all processes.
            rows: The items that this process asks for, by their places in the batch.

        Returns:
            Place in the batch → logits, shape (answer tokens, vocabulary), float32.
        """
        kept = all((item.index, self.of(item)) in self._states for item in items)
        wanted, found, by_teacher = set(rows), dict[int, Tensor](), dict[Reading, list[int]]()
        for row, item in enumerate(items):
            by_teacher.setdefault(self.of(item), []).append(row)
        for teacher, taught in by_teacher.items():
            lengths = [len(items[row].chosen) for row in taught]
            groups = [list(range(len(taught)))] if kept else length_groups(lengths, self._cost)
            with self._logits.reading(teacher):
                for group in groups:
                    every = [taught[place] for place in group]
                    # Who has none of these rows takes part with one: all processes gather the parameters together.
                    own = [row for row in every if row in wanted] or every[:1]
                    sizes = [len(items[row].chosen.answer) for row in own]
                    found |= zip(
                        own, self._said([items[row] for row in own], kept).split_with_sizes(sizes), strict=True
                    )
        return found

    def _said(self, items: Sequence[Item], kept: bool) -> Tensor:
        """Logits of all the items' answers by their one teacher, which the masks are read as now."""
        if not kept:
            return answer_logits(self._model, [item.chosen for item in items], self._pad_id)[0]
        states = torch.cat([self._states[item.index, self.of(item)] for item in items])
        return state_logits(self._model, states.to(next(self._model.parameters()).device))


def state_logits(model: Any, states: Tensor) -> Tensor:
    """What the model makes of last hidden states (tokens, width): logits, shape (tokens, vocabulary), float32.

    Raises:
        TypeError: The model is its own decoder; others may raise what they like (see `goes_on_from_states`).
    """
    ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)  # nobody looks at them
    with decoder_gives(model, states.unsqueeze(0)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float()


def goes_on_from_states(model: Any, sequences: Sequence[Encoded], pad_id: int) -> bool:
    """Whether logits made of these sequences' states are those of a pass, but for rounding."""
    passed = answer_logits(model, sequences, pad_id)[0]
    try:
        states = answer_states(model, sequences, pad_id)
        made = state_logits(model, states)
    except _UNABLE:
        return False
    # Of long sums in float32, or of each logit in a lower precision.
    rounding = max(32 * torch.finfo(torch.float32).eps, 2 * torch.finfo(states.dtype).eps)
    if made.shape != passed.shape:
        return False
    return float((made - passed).abs().max()) <= rounding * float(passed.abs().max())
