"""Training data against every evaluation set: which items ask what is evaluated, and so are dropped.

Prompts are compared without case, punctuation and repeated space. Knows no models and no training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from resafe.data.items import Conversation, DialoguePair, Example, Pair
from resafe.data.mixes import normalised
from resafe.data.questions import TASKS, load_questions
from resafe.data.registry import datasets, load_set
from resafe.data.sources import read_file

Item = TypeVar("Item", Example, Pair)

_SHIPPED = ("harmful", "harmless")
_UTILITY = {  # evaluation sets that are not questions of this package: file and the columns that hold text
    "copa": ("copa/copa_superglue_val100.jsonl", ("premise",)),
    "xcopa_zh": ("xcopa/test.zh.jsonl", ("premise",)),
    "xnli_hi": ("xnli_hi/xnli_dev_hi.jsonl", ("premise", "sentence1")),
    "humaneval": ("humaneval/HumanEval.jsonl", ("prompt",)),
}


@dataclass(frozen=True)
class EvaluationPrompts:
    """Normalised prompts of evaluation sets, each with the set it is in.

    Attributes:
        sets: Prompt → name of its set.
        compared: Names of the sets that are in it.
        absent: Names of the sets that could not be had here, and so were not compared with.
    """

    sets: Mapping[str, str]
    compared: tuple[str, ...]
    absent: tuple[str, ...]


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
        """Plain values for files: counts and ids by set, and the sets that were and were not compared with."""
        seen = self.prompts or EvaluationPrompts({}, (), ())
        return {
            "dropped": sum(map(len, self.dropped.values())),
            "by_set": self.dropped,
            "compared_with": list(seen.compared),
            "not_at_hand": list(seen.absent),
        }


def evaluation_prompts(data_dir: Path | None = None) -> EvaluationPrompts:
    """The prompts of every evaluation set that is at hand without a download.

    Those are the shipped questions (validation and test), the generated tasks' questions and, with `data_dir`, all
    registered question sets and the utility sets that have their files there.
    """
    found: dict[str, str] = {}
    compared, absent = [*_SHIPPED, *TASKS], []
    for name in (*_SHIPPED, *TASKS):
        for part in ("test", "validation"):
            _add(found, name, (question.prompt for question in load_questions(name, part)))
    for source in datasets:
        if source.kind != "questions":
            continue
        if data_dir is not None and source.file and (data_dir / source.file).is_file():
            _add(found, source.name, (item.prompt for item in load_set(source.name, data_dir=data_dir).items))
            compared.append(source.name)
        else:
            absent.append(source.name)
    for name, (file, columns) in _UTILITY.items():
        if data_dir is not None and (data_dir / file).is_file():
            rows = read_file(data_dir / file)
            _add(found, name, (str(row.values[key]) for row in rows for key in columns if key in row.values))
            compared.append(name)
        else:
            absent.append(name)
    return EvaluationPrompts(found, tuple(compared), tuple(absent))


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
        hit = next((prompts.sets[key] for key in map(normalised, _asked(item)) if key and key in prompts.sets), None)
        if hit is None:
            kept.append(item)
        else:
            dropped.setdefault(hit, []).append(item.id)
    return Overlap(kept, dropped, prompts)


def _asked(item: Example | Pair) -> list[str]:
    history = item.history if isinstance(item, Conversation | DialoguePair) else ()
    return [item.prompt, *(text for role, text in history if role == "user")]
