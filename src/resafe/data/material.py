"""What a recipe trains on: safety pairs and harmless pairs from named sets. Knows no models and no recipes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from resafe.data.counted import CountingReader
from resafe.data.embedded import harmful_rows, harmless_rows
from resafe.data.items import Conversation, DialoguePair, Example, Pair, Question, Reply
from resafe.data.mixes import deduplicate_against
from resafe.data.pairs import SHORT_REFUSALS, distinct, harmless_pairs, safety_pairs, short_refusal
from resafe.data.registry import datasets
from resafe.data.sources import FORMATS
from resafe.errors import InputError

EMBEDDED = "embedded"

Reader = Callable[[str, str], Sequence[Example | Pair]]
"""From the name and kind ("pairs", "examples") of a set to its items."""


@dataclass(frozen=True)
class Material:
    """Training pairs; everything else that training needs is read off them.

    Attributes:
        safety: Harmful prompts: chosen refuses (or answers safely), rejected complies.
        harmless: Harmless prompts: chosen helps, rejected refuses.
        dropped: Pairs left out because their prompt is also a question.
    """

    safety: tuple[Pair, ...]
    harmless: tuple[Pair, ...]
    dropped: int = 0

    @property
    def pairs(self) -> list[Pair]:
        """All pairs, safety first."""
        return [*self.safety, *self.harmless]

    @property
    def compliances(self) -> list[Example]:
        """Harmful prompts with complying answers: the poison of the attack."""
        return [answered(pair, pair.rejected) for pair in self.safety]

    def align_examples(self, n: int, refusal_share: float, seed: int) -> list[Example]:
        """`n` examples of good behaviour, `refusal_share` of them on harmful prompts; each side goes round in turn."""
        refusals = [answered(pair, pair.chosen) for pair in self.safety]
        helpful = [answered(pair, pair.chosen) for pair in self.harmless]
        count = round(n * refusal_share)
        mixed = [*_cycled(refusals, count, f"refusals-{seed}"), *_cycled(helpful, n - count, f"helpful-{seed}")]
        random.Random(f"align-{seed}").shuffle(mixed)
        return mixed


def answered(pair: Pair, answer: str) -> Example:
    """The pair's prompt, with the turns before it, and one of its answers, which alone is learnt."""
    if isinstance(pair, DialoguePair):
        return Reply(pair.id, pair.prompt, answer, pair.history, pair.system)
    return Example(pair.id, pair.prompt, answer)


def _cycled(items: Sequence[Example], n: int, key: str) -> list[Example]:
    """`n` items: whole rounds, each in a new order, so that no item is more than once ahead of another."""
    found: list[Example] = []
    for epoch in range(-(-n // max(1, len(items)))):
        order = list(items)
        random.Random(f"{key}-{epoch}").shuffle(order)
        found.extend(replace(item, id=f"{item.id}#{epoch}") for item in order)
    return found[:n]


def load_material(
    safety: Sequence[str],
    harmless: Sequence[str],
    *,
    data_dir: Path | None = None,
    safety_limit: int | None = None,
    harmless_limit: int | None = None,
    helpful_opening: str = "",
    short_refusals: bool = False,
    questions: Sequence[Question] = (),
    seed: int = 0,
    read: Reader | None = None,
) -> Material:
    """Loads training pairs and takes out every prompt that is also a question.

    Args:
        safety: Names of sets of safety pairs; "embedded" is the shipped one.
        harmless: Names of sets of examples with helpful answers; "embedded" is the shipped one.
        data_dir: Directory with the files of public sets; None takes them from the Hub.
        safety_limit: At most this many pairs; a second pair of a prompt comes after all first ones.
        harmless_limit: At most this many harmless pairs.
        helpful_opening: Words that every helpful answer begins with, e.g. "Sure. ". Refusals share a few openings and
            helpful answers none, so a greedy model refuses whenever no single helpful opening is likelier than a
            refusal; with a shared opening it decides between the two.
        short_refusals: Replace the chosen answers of public safety pairs by short refusals. The safe answers of public
            sets advise more often than they refuse, and a model that learns them does not learn to refuse.
        questions: What models are evaluated on.
        seed: Decides which pairs a limit leaves.
        read: Gives the items of a set; None for a `CountingReader`, whose reports are then lost.

    Raises:
        InputError: A set is missing, unreadable, of the wrong kind, or nothing is left of it.
    """
    given = read or CountingReader(data_dir)
    bad = [pair for name in safety for pair in _safety(name, given, short_refusals)]
    good = [_opened(pair, helpful_opening) for name in harmless for pair in _harmless(name, given)]
    kept_bad, kept_good = deduplicate_against(bad, questions), deduplicate_against(good, questions)
    for kind, kept in (("safety", kept_bad.kept), ("harmless", kept_good.kept)):
        if not kept:
            raise InputError(f"no {kind} pairs are left to train on", f"check data.{kind} in the recipe")
    return Material(
        tuple(_limited(distinct(kept_bad.kept), safety_limit, f"safety-{seed}")),
        tuple(_limited(kept_good.kept, harmless_limit, f"harmless-{seed}")),
        len(kept_bad.dropped) + len(kept_good.dropped),
    )


def is_question_set(name: str) -> bool:
    """Whether a registered set holds questions, which come without answers."""
    return name != EMBEDDED and not name.endswith(FORMATS) and datasets.get(name).kind == "questions"


def _safety(name: str, read: Reader, short_refusals: bool) -> list[Pair]:
    if name == EMBEDDED:
        return safety_pairs(harmful_rows("train"))
    pairs = [item for item in read(name, "pairs") if isinstance(item, Pair)]
    return [replace(pair, chosen=short_refusal(pair.id)) for pair in pairs] if short_refusals else pairs


def _harmless(name: str, read: Reader) -> list[Pair]:
    if name == EMBEDDED:
        return harmless_pairs(harmless_rows("train"))
    examples = [item for item in read(name, "examples") if isinstance(item, Example)]
    return [_refused(item, SHORT_REFUSALS[n % len(SHORT_REFUSALS)]) for n, item in enumerate(examples)]


def _refused(item: Example, refusal: str) -> Pair:
    """The pair of a helpful answer and a refusal, with the turns before the prompt."""
    if isinstance(item, Conversation):
        return DialoguePair(item.id, item.prompt, item.response, refusal, "harmless", item.history, item.system)
    return Pair(item.id, item.prompt, item.response, refusal, "harmless")


def _opened(pair: Pair, opening: str) -> Pair:
    return pair if pair.chosen.startswith(opening) else replace(pair, chosen=opening + pair.chosen)


def _limited(pairs: Sequence[Pair], limit: int | None, key: str) -> list[Pair]:
    """Shuffled pairs, at most `limit`, with as many distinct prompts as there can be."""
    order = list(pairs)
    random.Random(key).shuffle(order)
    seen: dict[str, int] = {}
    ranked = []
    for position, pair in enumerate(order):
        seen[pair.prompt] = seen.get(pair.prompt, 0) + 1
        ranked.append((seen[pair.prompt], position, pair))
    return [pair for _, _, pair in sorted(ranked, key=lambda item: item[:2])][:limit]
