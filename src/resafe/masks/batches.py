"""What a mask is trained on, as batches of fixed composition. The order depends on the seed alone."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resafe.data.chat import before_prompt, encode_answer
from resafe.data.dealt import dealt
from resafe.data.items import Example, Pair
from resafe.errors import InputError
from resafe.masks.losses import Encoded

SIDES = ("safety", "harmless", "task")


@dataclass(frozen=True)
class Item:
    """One training item: an answer to make likely, and for preference pairs one to make unlikely.

    `side` is "safety" (refuse a harmful prompt), "harmless" (help with a harmless one) or "task" (keep the task);
    `task` is the place of the tuned model that a task example belongs to, where that is known.
    """

    index: int
    side: str
    chosen: Encoded
    rejected: Encoded | None
    task: int | None = None


def encode_items(
    tokenizer: Any,
    system: str | None,
    pairs: Sequence[Pair],
    keep: Sequence[Example],
    answer_tokens: int | None = None,
    keep_of: Sequence[int] = (),
) -> list[Item]:
    """Tokenises pairs and task examples.

    Args:
        tokenizer: A tokenizer with a chat template.
        system: As in `resafe.data.chat.render`.
        pairs: Safety and harmless pairs.
        keep: Task examples, never cut.
        answer_tokens: Only this many tokens of the pairs' answers are used; None for all.
        keep_of: The place of the tuned model that each task example belongs to; empty where it is not known.

    Raises:
        InputError: There is no safety pair.
    """
    if not any(pair.side == "safety" for pair in pairs):
        raise InputError(
            "no safety pairs to train the mask on", "give pairs whose chosen answer refuses a harmful request"
        )

    def encode(item: Pair | Example, response: str, cut: int | None = None) -> Encoded:
        own, history = before_prompt(item, system)
        head, tail = encode_answer(tokenizer, item.prompt, response, own, history)
        return Encoded(tuple(head), tuple(tail[:cut]))

    items = [
        Item(
            index,
            pair.side,
            encode(pair, pair.chosen, answer_tokens),
            encode(pair, pair.rejected, answer_tokens),
        )
        for index, pair in enumerate(pairs)
    ]
    start = len(items)
    owners: Sequence[int | None] = keep_of or [None] * len(keep)
    items += [
        Item(start + n, "task", encode(e, e.response), None, owner)
        for n, (e, owner) in enumerate(zip(keep, owners, strict=True))
    ]
    return items


def composition(items: Sequence[Item], size: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Items of each side in a batch, by largest remainder; sides without items are left out and the rest scaled up.

    A batch too small for the task or for harmless prompts is warned of: trials of a step or two may want it.

    Raises:
        InputError: A side is unknown, none has both a share and items, or safety has both and yet no place.
    """
    if unknown := sorted(set(shares) - set(SIDES)):
        raise InputError(f"shares: there is no side {unknown[0]!r}", f"the sides are {', '.join(SIDES)}")
    there = {item.side for item in items}
    sides = {side: share for side, share in shares.items() if share > 0 and side in there}
    if not sides:
        raise InputError(
            f"shares {dict(shares)}: no side has both a share and items, of which there are some for "
            f"{', '.join(sorted(there)) or 'none'}",
            "give one of those a share, or give examples of the task (keep)",
        )
    counts = dealt(sides, size)
    if left_out := [side for side in sides if counts[side] == 0]:
        enough = math.ceil(sum(sides.values()) / min(sides.values()))  # is enough; the least may be below it
        enough = next((more for more in range(size + 1, min(enough, 1000)) if all(dealt(sides, more).values())), enough)
        found = f"batches of {size} have no place for {' and '.join(left_out)}, with shares {sides}"
        if "safety" in left_out:
            raise InputError(found, f"set batch_size to {enough} or more, or give other shares")
        warnings.warn(f"{found}; from batch_size {enough} on they have", stacklevel=2)
    return counts


class Batches:
    """Batches in which every side has its share; each side is reshuffled when it has been gone through.

    Args:
        items: All items.
        size: Items a batch.
        shares: Side → weight, as in `composition`.
        seed: Seed of the order.

    Raises:
        InputError: As in `composition`.
    """

    def __init__(self, items: Sequence[Item], size: int, shares: Mapping[str, float], seed: int) -> None:
        self._counts = composition(items, size, shares)
        self._sides = {side: [item for item in items if item.side == side] for side in self._counts}
        self._seed = seed
        self._last: dict[str, tuple[int, list[int]]] = {}

    @property
    def counts(self) -> dict[str, int]:
        """Items of each side in every batch."""
        return dict(self._counts)

    def at(self, step: int) -> list[Item]:
        """The batch of a step (from 0); a pure function, so that a resumed run sees the same batches."""
        batch: list[Item] = []
        for side, own in self._counts.items():
            pool = self._sides[side]
            for position in range(step * own, (step + 1) * own):
                epoch, place = divmod(position, len(pool))
                batch.append(pool[self._order(side, epoch)[place]])
        return batch

    def _order(self, side: str, epoch: int) -> list[int]:
        """How a side is gone through in an epoch; the last one asked for is kept, as steps follow each other."""
        if self._last.get(side, (None, []))[0] != epoch:
            order = list(range(len(self._sides[side])))
            random.Random(f"{self._seed}-{side}-{epoch}").shuffle(order)
            self._last[side] = (epoch, order)
        return self._last[side][1]
