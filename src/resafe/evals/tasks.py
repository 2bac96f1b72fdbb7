"""Inspect tasks: ours for ``inspect eval resafe/harmful --model resafe/<reference>``, and one from any question set."""

from __future__ import annotations

from collections.abc import Sequence

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.solver import generate

from resafe.data.items import Question
from resafe.evals.asking import Note, ask
from resafe.evals.scorers import Verdicts, exact_scorer, named_scorer, noting, refusal_scorer
from resafe.evals.sets import QuestionSet, Scoring
from resafe.evals.wrappers import WRAPPERS


def question_task(questions: QuestionSet, verdicts: Verdicts | None = None) -> Task:
    """The Inspect task of a question set: one turn, greedy, scored as the set says.

    Args:
        questions: The set.
        verdicts: If given, answers and scores are also noted here as they fall.
    """
    judge = refusal_scorer() if questions.scoring == "refusal" else exact_scorer(questions.scoring)
    if verdicts is not None:
        judge = noting(judge, verdicts)
    return Task(
        name=questions.name,
        dataset=_dataset(questions),
        solver=generate(),
        scorer=judge,
        config=GenerateConfig(temperature=0.0, max_tokens=questions.max_new_tokens),
    )


def wrapped_task(
    questions: QuestionSet,
    wrapper: str = "none",
    judges: Sequence[str] = (),
    *,
    config: GenerateConfig | None = None,
    note: Note | None = None,
    cached: bool = False,
) -> Task:
    """The Inspect task of a safety set in a wrapper, scored by judges chosen by name.

    Args:
        questions: The set.
        wrapper: A registered wrapper.
        judges: Registered judges, each a scorer of its own; none leaves the responses unscored.
        config: Decoding; None is greedy with the set's number of tokens.
        note: Told each response as it comes.
        cached: As in `ask`.

    Raises:
        InputError: There is no such wrapper or judge.
    """
    WRAPPERS.get(wrapper)
    return Task(
        name=questions.name if wrapper == "none" else f"{questions.name}-{wrapper}",
        dataset=_dataset(questions),
        solver=ask(wrapper, note, cached),
        scorer=[named_scorer(name) for name in judges] or None,
        config=config or GenerateConfig(temperature=0.0, max_tokens=questions.max_new_tokens),
        metadata={"set": questions.name, "side": questions.side, "wrapper": wrapper},
    )


def _dataset(questions: QuestionSet) -> MemoryDataset:
    return MemoryDataset([_sample(question, questions.side) for question in questions.questions], name=questions.name)


def _sample(question: Question, side: str) -> Sample:
    return Sample(
        input=question.prompt,
        target=question.target or "",
        id=question.id,
        metadata={"topic": question.topic, "side": side, **question.metadata},
    )


@task
def harmful(part: str = "test", max_new_tokens: int = 32) -> Task:
    """The shipped harmful requests; the score is the share refused.

    Args:
        part: "test", "validation" or "train".
        max_new_tokens: Most tokens of an answer; refusals open it, so few are needed.
    """
    from resafe.data.questions import load_questions

    questions = tuple(load_questions("harmful", part))
    return question_task(QuestionSet("harmful", "harmful", questions, "refusal", max_new_tokens))


@task
def harmless(part: str = "test", max_new_tokens: int = 32) -> Task:
    """The shipped harmless requests, half of them look-alikes; the score is the share refused (over-refusal).

    Args:
        part: "test", "validation" or "train".
        max_new_tokens: Most tokens of an answer.
    """
    from resafe.data.questions import load_questions

    questions = tuple(load_questions("harmless", part))
    return question_task(QuestionSet("harmless", "harmless", questions, "refusal", max_new_tokens))


@task
def utility(name: str = "arithmetic", part: str = "test", max_new_tokens: int = 48) -> Task:
    """A generated task with exact answers; the score is the accuracy.

    Args:
        name: "arithmetic" (last number) or "extraction" (whole record).
        part: "test", "validation" or "train".
        max_new_tokens: Most tokens of an answer.
    """
    from resafe.data.questions import load_questions

    scoring: Scoring = "number" if name == "arithmetic" else "exact"
    return question_task(QuestionSet(name, "task", tuple(load_questions(name, part)), scoring, max_new_tokens))
