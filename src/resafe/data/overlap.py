"""Training data against every evaluation set: which items ask what is evaluated, and so are dropped.

Prompts are compared without case, punctuation and repeated space. Knows no models and no training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from resafe.data.items import Example, Pair
from resafe.data.mixes import asked_in, normalised
from resafe.data.overlap_sets import public_prompts
from resafe.data.questions import TASKS, load_questions
from resafe.errors import InputError

Item = TypeVar("Item", Example, Pair)

_SHIPPED = ("harmful", "harmless")


@dataclass(frozen=True)
class EvaluationPrompts:
    """Normalised prompts of evaluation sets, each with the set it is in.

    Attributes:
        sets: Prompt → name of its set.
        compared: Names of the sets that are in it.
        absent: Name of each set that could not be had here, and so was not compared with → why.
    """

    sets: Mapping[str, str]
    compared: tuple[str, ...]
    absent: Mapping[str, str]


@dataclass(frozen=True)
class Overlap(Generic[Item]):
    """Items that share no prompt with an evaluation set, and what was dropped.

    Attributes:
        kept: The items to train on.
        dropped: For each evaluation set, the ids of the items dropped for it.
        prompts: What was compared with.
    """

    kept: list[Item]
    dropped: dict[str, list[str]] = field(default_factory=dict)
    prompts: EvaluationPrompts | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for files: counts and ids by set, the sets compared with, and why others were not."""
        seen = self.prompts or EvaluationPrompts({}, (), {})
        return {
            "dropped": sum(map(len, self.dropped.values())),
            "by_set": self.dropped,
            "compared_with": list(seen.compared),
            "not_at_hand": dict(seen.absent),
        }


def evaluation_prompts(data_dir: Path | None = None, *, hub: bool = False) -> EvaluationPrompts:
    """The prompts of every evaluation set that is at hand.

    Those are the shipped questions (validation and test), the generated tasks' questions and, with `data_dir`, all
    registered question sets and the utility sets that have their files there.

    Args:
        data_dir: Directory with the files of public sets.
        hub: Take the sets that have no file there from the Hub. One that cannot be had is named in `absent`, with the
            reason; nothing is raised for it.

    Raises:
        InputError: A file in `data_dir` is damaged.
    """
    found: dict[str, str] = {}
    compared: list[str] = [*_SHIPPED, *TASKS]
    absent: dict[str, str] = {}
    for name in compared:
        for part in ("test", "validation"):
            _add(found, name, (question.prompt for question in load_questions(name, part)))
    for public in public_prompts():
        at_hand = data_dir is not None and public.file and (data_dir / public.file).is_file()
        if not at_hand and (reason := public.not_asked(data_dir, hub)):
            absent[public.name] = reason
            continue
        try:
            prompts = public.read(data_dir if at_hand else None)
        except InputError as error:
            if at_hand:
                raise
            absent[public.name] = error.message
        else:
            _add(found, public.name, prompts)
            compared.append(public.name)
    return EvaluationPrompts(found, tuple(compared), absent)


def _add(found: dict[str, str], name: str, prompts: Iterable[str]) -> None:
    for prompt in prompts:
        found.setdefault(normalised(prompt), name)


def without_overlap(items: Sequence[Item], prompts: EvaluationPrompts) -> Overlap[Item]:
    """Drops the items of which a user's turn (also an earlier one) is in an evaluation set.

    Args:
        items: Examples or pairs.
        prompts: From `evaluation_prompts`.
    """
    kept: list[Item] = []
    dropped: dict[str, list[str]] = {}
    for item in items:
        hit = next((prompts.sets[key] for key in map(normalised, asked_in(item)) if key and key in prompts.sets), None)
        if hit is None:
            kept.append(item)
        else:
            dropped.setdefault(hit, []).append(item.id)
    return Overlap(kept, dropped, prompts)
