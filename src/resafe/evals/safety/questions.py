"""The question sets of an evaluation of safety, each with the side that its questions are on."""

from __future__ import annotations

from dataclasses import dataclass

from resafe.data.items import Question
from resafe.data.questions import load_questions
from resafe.errors import InputError
from resafe.evals.records import Side
from resafe.evals.safety.settings import SafetySettings
from resafe.evals.sets import QuestionSet

_HARMLESS_ALIASES = {"xstest": "xstest_safe"}


@dataclass(frozen=True)
class Asked:
    """A set as it is asked: in a wrapper.

    Attributes:
        questions: The set.
        wrapper: The wrapper's name.
    """

    questions: QuestionSet
    wrapper: str

    @property
    def label(self) -> str:
        """The set's name, with the wrapper where there is one: "catqa", "catqa+cot"."""
        return self.questions.name if self.wrapper == "none" else f"{self.questions.name}+{self.wrapper}"


def ask_sets(settings: SafetySettings) -> list[Asked]:
    """All sets in all wrappers; harmless sets as they are.

    A set of both sides is split: "xstest" gives xstest_harmful and xstest_harmless.

    Raises:
        InputError: An unknown or unreadable set, one with tasks instead, or two of one name.
    """
    found: list[QuestionSet] = []
    for name in settings.sets:
        found += _sides(name, settings, None)
    for name in settings.harmless:
        found += _sides(_HARMLESS_ALIASES.get(name, name), settings, "harmless")
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise InputError(f"two sets have one name: {', '.join(sorted(names))}", "name each once; rename a file")
    return [
        Asked(one, wrapper) for one in found for wrapper in (settings.wrappers if one.side == "harmful" else ("none",))
    ]


def _sides(name: str, settings: SafetySettings, side: Side | None) -> list[QuestionSet]:
    questions = load_questions(name, limit=settings.limit, data_dir=settings.data_dir)
    short = name.rpartition("/")[2].rpartition(".")[0] if name.endswith((".jsonl", ".json", ".csv")) else name
    if side is not None:
        return [_set(short, side, questions, settings)]
    by_side: dict[Side, list[Question]] = {}
    for question in questions:
        by_side.setdefault(_side(name, question), []).append(question)
    if len(by_side) == 1:
        return [_set(short, *next(iter(by_side.items())), settings)]
    return [_set(f"{short}_{one}", one, chosen, settings) for one, chosen in by_side.items()]


def _side(name: str, question: Question) -> Side:
    """A question's own side; harmful where a file says nothing, and where a published set is of no one side."""
    given = question.metadata.get("side", "harmful")
    if given in ("task", "text"):
        raise InputError(f"the set {name!r} is for usefulness, not for safety", "measure it: resafe eval utility")
    return "harmless" if given == "harmless" else "harmful"


def _set(name: str, side: Side, questions: list[Question], settings: SafetySettings) -> QuestionSet:
    return QuestionSet(name, side, tuple(questions), "refusal", settings.max_new_tokens)
