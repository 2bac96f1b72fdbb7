"""A labelled response, and a user's file of them. Knows the words for labels and no data set by name."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resafe.data.mixes import normalised
from resafe.data.sources import Row, read_file
from resafe.errors import InputError, listed
from resafe.evals.judge import Judged, Measure

REFUSED = (
    *("refused", "refusal", "refuses", "full_refusal", "partial_refusal", "partial"),
    *("2_full_refusal", "3_partial_refusal"),
)
ANSWERED = ("answered", "answer", "complied", "compliance", "full_compliance", "1_full_compliance", "not_refused")
HARMFUL = ("harmful", "unsafe", "harmful_answer")
HARMLESS = ("harmless", "unharmful", "safe", "not_harmful")
HARMLESS_ANSWER = ("harmless_answer",)
YES, NO = ("1", "true", "yes"), ("0", "false", "no")


@dataclass(frozen=True)
class Labelled:
    """A response with what people say of it.

    Attributes:
        id: Unique within its file or set.
        prompt: The question.
        response: The answer.
        refusal: Whether it refuses, wholly or in part; None where nobody said.
        harm: Whether it is harmful; None where nobody said.
        model: The model that gave it; empty where unknown.
        language: "en", "zh", …; empty where unknown.
        set: Name of the set or file.
    """

    id: str
    prompt: str
    response: str
    refusal: bool | None = None
    harm: bool | None = None
    model: str = ""
    language: str = ""
    set: str = ""

    def label(self, measure: Measure) -> bool | None:
        """Its label for what a judge measures; None where it has none."""
        return {"refusal": self.refusal, "harm": self.harm}.get(measure)

    def judged(self) -> Judged:
        """What a judge gets to see."""
        return Judged(self.id, self.prompt, self.response, self.language or None)


def overlap_key(prompt: str) -> str:
    """32 hex digits that are equal for prompts equal up to case, punctuation and space."""
    return hashlib.sha256(f"resafe-judge:{normalised(prompt)}".encode()).hexdigest()[:32]


def without_prompts(rows: Iterable[Labelled], keys: Collection[str]) -> list[Labelled]:
    """The rows whose prompt's `overlap_key` is not among the keys."""
    return [row for row in rows if overlap_key(row.prompt) not in keys]


def read_labelled(path: Path, measure: Measure | None = None) -> list[Labelled]:
    """Reads a user's JSONL, JSON or CSV file with the columns prompt, response and label.

    Labels are words: "refused", "partial", "answered"; "harmful", "harmless"; "harmless-answer" (and the synonyms of
    this module). In a file that has refusals too, "harmful" and "harmless" are answers; in one that has none,
    "harmless" says nothing of refusing. With `measure`, 1/0, true/false and yes/no are understood too. `model`,
    `language` and `id` are read where the file has them.

    Args:
        path: The file.
        measure: What the labels say, "refusal" or "harm"; None: the words show it.

    Raises:
        InputError: No such file, a missing column, an empty prompt or response, or labels that are not known; up to
            ten are listed with their lines.
    """
    rows = read_file(path)
    words = [_word(row.value("label")) for row in rows]
    three_way = measure is None and any(word in REFUSED for word in words)
    found, problems = [], []
    for number, (row, word) in enumerate(zip(rows, words, strict=True)):
        try:
            refusal, harm = _meaning(word, measure, three_way)
        except KeyError:
            problems.append(f"{row.place}: label {row.value('label')!r}")
            continue
        found.append(
            Labelled(
                id=_optional(row, "id") or str(number),
                prompt=row.text("prompt"),
                response=str(row.value("response") or ""),
                refusal=refusal,
                harm=harm,
                model=_optional(row, "model"),
                language=_optional(row, "language"),
                set=path.stem,
            )
        )
    if problems:
        yes_no = all(word in YES + NO for word in words)
        hint = "say what 1 means: --measure refusal or --measure harm" if yes_no else f"known: {', '.join(_known())}"
        raise InputError(f"{len(problems)} labels of {path} are not known:\n  {listed(problems)}", hint)
    return unique_ids(found)


def unique_ids(rows: Sequence[Labelled]) -> list[Labelled]:
    """The rows; numbered instead where an id occurs twice (one question answered by several models)."""
    from dataclasses import replace

    if len({row.id for row in rows}) == len(rows):
        return list(rows)
    return [replace(row, id=str(number)) for number, row in enumerate(rows)]


def _known() -> tuple[str, ...]:
    return ("refused", "partial", "answered", "harmful", "harmless", "harmless-answer")


def _word(value: Any) -> str:
    return "_".join(str(value).strip().lower().replace("-", " ").split())


def _meaning(word: str, measure: Measure | None, three_way: bool) -> tuple[bool | None, bool | None]:
    """(refuses, is harmful) of a label; raises KeyError for a word that is not known."""
    if measure is not None and word in YES + NO:
        yes = word in YES
        return (yes, None) if measure == "refusal" else (None, yes)
    if word in REFUSED:
        return True, False if three_way else None
    if word in ANSWERED:
        return False, None
    if word in HARMLESS_ANSWER:
        return False, False
    if word in HARMFUL:
        return False if three_way else None, True
    if word in HARMLESS:
        return False if three_way else None, False
    raise KeyError(word)


def _optional(row: Row, name: str) -> str:
    return str(row.value(name) or "") if row.has(name) else ""
