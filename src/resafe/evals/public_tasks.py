"""The public question sets as Inspect tasks: ``inspect eval resafe/catqa --model ... -T data_dir=DIR``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from inspect_ai import Task, task

from resafe.data.questions import load_questions
from resafe.errors import InputError
from resafe.evals.records import Side
from resafe.evals.sets import QuestionSet
from resafe.evals.tasks import question_task, wrapped_task
from resafe.files import split_names

PUBLIC_TASKS: dict[str, Side] = {
    **dict.fromkeys(
        (
            "advbench", "beavertails", "beavertails_published", "catqa", "catqa_published", "catqa_vi", "catqa_zh",
            "dangerousqa", "dangerousqa_published", "do_not_answer", "harmbench", "harmfulqa", "harmfulqa_published",
            "jailbreakbench", "malicious_instruct", "shadow_alignment", "strongreject", "xstest_unsafe",
        ),
        "harmful",
    ),
    **dict.fromkeys(("oktest", "or_bench", "or_bench_published", "xstest_safe"), "harmless"),
}  # fmt: skip
"""Each set's side. The published Shadow-Alignment file is of no one side, so it is no task."""


def public_task(
    name: str,
    side: Side,
    data_dir: str | None,
    limit: int | None,
    max_new_tokens: int,
    wrapper: str = "none",
    judges: str = "",
) -> Task:
    """The task of a public set; without `judges` the score is the share refused, by the rules.

    Raises:
        InputError: An unreadable set, a data directory that is not there, or no such wrapper or judge.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise InputError(f"there is no directory {data_dir}", "give the directory of the public sets' files")
    found = load_questions(name, limit=limit, data_dir=Path(data_dir) if data_dir else None)
    questions = QuestionSet(name, side, tuple(found), "refusal", max_new_tokens)
    if wrapper == "none" and not judges:
        return question_task(questions)
    return wrapped_task(questions, wrapper, judge_names(judges or "refusal"))


def judge_names(text: str) -> list[str]:
    """Names separated by commas, also as Inspect's `-T judges=a,b` gives them; none twice."""
    return list(split_names(text))


def _task_of(name: str, side: Side) -> Callable[..., Task]:
    def make(
        data_dir: str | None = None,
        limit: int | None = None,
        max_new_tokens: int = 64,
        wrapper: str = "none",
        judges: str = "",
    ) -> Task:
        return public_task(name, side, data_dir, limit, max_new_tokens, wrapper, judges)

    make.__name__ = make.__qualname__ = name
    registered: Callable[..., Task] = task(name=name)(make)
    return registered


TASKS = {name: _task_of(name, side) for name, side in PUBLIC_TASKS.items()}


@task
def questions(
    file: str,
    side: str = "harmful",
    limit: int | None = None,
    max_new_tokens: int = 64,
    wrapper: str = "none",
    judges: str = "refusal",
) -> Task:
    """A user's own questions: a .jsonl, .json or .csv file with a column `prompt` and, if wanted, `topic`.

    Args:
        file: The file.
        side: "harmful" or "harmless": what its questions are.
        limit: Only so many questions, evenly over topics.
        max_new_tokens: Most tokens of an answer.
        wrapper: A red-team wrapper.
        judges: Judges, separated by commas.
    """
    if side not in ("harmful", "harmless"):
        raise InputError(f"side is {side!r}", "give harmful or harmless")
    found = load_questions(file, limit=limit)
    chosen: Side = "harmful" if side == "harmful" else "harmless"
    asked = QuestionSet(Path(file).stem, chosen, tuple(found), "refusal", max_new_tokens)
    return wrapped_task(asked, wrapper, judge_names(judges))
