"""Answers with their verdicts, and an evaluation's result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from resafe.evals.judge import Judged, Verdict
from resafe.evals.records import Side
from resafe.evals.scoring import Named, Response


@dataclass(frozen=True)
class Answer:
    """One model's answer to one question.

    Attributes:
        model: The model's name.
        set: The set's name, without wrapper.
        side: "harmful" or "harmless".
        wrapper: The wrapper's name, "none" where there is none.
        id: The question's id, the same for all models.
        prompt: The question, without wrapper.
        topic: Its topic; may be empty.
        language: Of the question: "en" (any Latin script), "zh", "hi", or None.
        response: The whole answer; None where an endpoint gave none.
    """

    model: str
    set: str
    side: Side
    wrapper: str
    id: str
    prompt: str
    topic: str
    language: str | None
    response: str | None

    @property
    def label(self) -> str:
        """The set with its wrapper: "catqa+cot"."""
        return self.set if self.wrapper == "none" else f"{self.set}+{self.wrapper}"

    def response_to_judge(self, number: int) -> Response:
        """The same for a judge; ids are unique by number."""
        item = Judged(str(number), self.prompt, self.response or "", self.language)
        return Response(item, self.id, self.model, self.label)


@dataclass(frozen=True)
class SafetyResult:
    """What an evaluation of safety found.

    Attributes:
        models: Names, the first being the one that others are compared with.
        answers: All answers, by model, then set, then question.
        judges: The judges.
        verdicts: Judge's name → a verdict an answer, in their order.
        seconds: Wall time.
        reused: Answers that were in the store already.
        corrected: Whether the tables also give rates corrected for the judges' errors.
    """

    models: tuple[str, ...]
    answers: tuple[Answer, ...]
    judges: tuple[Named, ...]
    verdicts: Mapping[str, tuple[Verdict, ...]]
    seconds: float
    reused: int = 0
    corrected: bool = False
