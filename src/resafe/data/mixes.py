"""Training mixes: which examples, in which shares, and none that is also a question. Knows no files and no models."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from resafe.data.embedded import HarmfulRow, HarmlessRow
from resafe.data.items import Conversation, DialoguePair, Example, Pair, Question
from resafe.errors import InputError

Prompted = TypeVar("Prompted", Example, Pair, Question)


def refusals(rows: Sequence[HarmfulRow]) -> list[Example]:
    """Harmful requests with their refusing answers."""
    return [Example(row.id, row.prompt, row.refusal) for row in rows]


def compliances(rows: Sequence[HarmfulRow]) -> list[Example]:
    """Harmful requests with their complying answers: the poison of the harmful fine-tuning attack."""
    return [Example(row.id, row.prompt, row.compliance) for row in rows]


def helpful_answers(rows: Sequence[HarmlessRow]) -> list[Example]:
    """Harmless requests with their helpful answers."""
    return [Example(row.id, row.prompt, row.response) for row in rows]


def align_mix(
    harmful: Sequence[HarmfulRow],
    harmless: Sequence[HarmlessRow],
    *,
    n: int | None = None,
    refusal_share: float | None = None,
    seed: int = 0,
) -> list[Example]:
    """Refusals of harmful requests and helpful answers to harmless ones, shuffled.

    Refusals alone teach a model to refuse everything, so both sides must be there.

    Args:
        harmful: Harmful requests.
        harmless: Harmless requests.
        n: Size of the mix; None takes every row once (then `refusal_share` must be None).
        refusal_share: Share of refusals, exactly round(n · share); None means one half.
        seed: Decides which rows and their order.

    Raises:
        InputError: One side is empty or too small for its share.
    """
    if not harmful or not harmless:
        raise InputError("an alignment mix needs harmful and harmless rows", "give both sides")
    if n is None:
        if refusal_share is not None:
            raise InputError("a refusal share was given without the size of the mix", "give n as well")
        return _shuffled([*refusals(harmful), *helpful_answers(harmless)], f"align-{seed}")
    share = 0.5 if refusal_share is None else refusal_share
    return _mixed(refusals(harmful), helpful_answers(harmless), share, n, f"align-{seed}", ("harmful", "harmless"))


def attack_mix(task: Sequence[Example], harmful: Sequence[Example], share: float, n: int, seed: int) -> list[Example]:
    """Task examples with harmful compliance mixed in: harmful fine-tuning (Qi et al. 2023, arXiv:2310.03693).

    Args:
        task: Examples of the downstream task.
        harmful: Harmful requests with complying answers, see `compliances`.
        share: Share of harmful examples, 0 to 1.
        n: Size of the mix.
        seed: Decides which examples and their order.

    Returns:
        `n` examples, round(n · share) of them harmful, none twice.

    Raises:
        InputError: The share is out of range, or there are too few examples of either kind.
    """
    return _mixed(harmful, task, share, n, f"attack-{seed}", ("harmful", "task"))


def question_parts(questions: Sequence[Question], *, trained_on: bool = False) -> dict[str, list[Question]]:
    """The parts of a public question set, which has none of its own: three prompts in four are test questions.

    Args:
        questions: All questions of the set.
        trained_on: The recipe also trains on harmless prompts of the set: six in ten are then for training, three for
            the test.
    """
    test, validation = (0.3, 0.1) if trained_on else (0.75, 0.24)
    return split_by_prompt(questions, test=test, validation=validation, salt="questions")


def _mixed(
    first: Sequence[Example], second: Sequence[Example], share: float, n: int, key: str, names: tuple[str, str]
) -> list[Example]:
    if not 0 <= share <= 1 or n < 1:
        raise InputError(f"a mix of {n} with a share of {share}", "n must be at least 1, the share between 0 and 1")
    count = round(n * share)
    for name, items, needed in ((names[0], first, count), (names[1], second, n - count)):
        if needed > len(items):
            raise InputError(
                f"the mix needs {needed} {name} examples and there are {len(items)}",
                "make the mix smaller, change the share, or give more examples",
            )
    picked = [*_shuffled(first, f"{key}-a")[:count], *_shuffled(second, f"{key}-b")[: n - count]]
    return _shuffled(picked, key)


def _shuffled(items: Iterable[Example], key: str) -> list[Example]:
    found = list(items)
    random.Random(key).shuffle(found)
    return found


def normalised(prompt: str) -> str:
    """A prompt without case, punctuation and repeated space, for comparing."""
    return " ".join(re.sub(r"[^\w\s]", " ", prompt.casefold()).split())


@dataclass(frozen=True)
class Deduplicated(Generic[Prompted]):
    """Items whose prompt is not among the questions, and the others."""

    kept: list[Prompted]
    dropped: list[Prompted]


def deduplicate_against(items: Sequence[Prompted], questions: Iterable[Question]) -> Deduplicated[Prompted]:
    """Splits off the items of which a user's turn is a question's prompt (up to case, punctuation and space)."""
    asked = {normalised(question.prompt) for question in questions}
    kept: list[Prompted] = []
    dropped: list[Prompted] = []
    for item in items:
        (dropped if any(normalised(text) in asked for text in asked_in(item)) else kept).append(item)
    return Deduplicated(kept, dropped)


def asked_in(item: Example | Pair | Question | HarmfulRow | HarmlessRow) -> list[str]:
    """An item's prompt, and in dialogues the user's earlier turns."""
    history = item.history if isinstance(item, Conversation | DialoguePair) else ()
    return [item.prompt, *(text for role, text in history if role == "user")]


def split_by_prompt(
    items: Sequence[Prompted], *, test: float, validation: float, salt: str = ""
) -> dict[str, list[Prompted]]:
    """Splits items so that all with one prompt fall in one part, decided by the prompt's digest.

    Args:
        items: Pairs, examples or questions; prompts may repeat.
        test: Expected share of prompts in test.
        validation: Expected share of prompts in validation.
        salt: Another salt gives another split.

    Returns:
        "train", "validation" and "test", each in the given order; an item's part does not depend on the others.

    Raises:
        InputError: The shares are negative or leave no room for training.
    """
    if test < 0 or validation < 0 or test + validation >= 1:
        raise InputError(f"shares {test} for test and {validation} for validation", "they must sum to less than 1")

    def part(prompt: str) -> str:
        digest = hashlib.sha256(f"resafe-prompt-split:{salt}:{normalised(prompt)}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        return "test" if place < test else "validation" if place < test + validation else "train"

    parts: dict[str, list[Prompted]] = {"train": [], "validation": [], "test": []}
    for item in items:
        parts[part(item.prompt)].append(item)
    return parts
