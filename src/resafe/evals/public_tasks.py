"""The public question sets as Inspect tasks: ``inspect eval resafe/catqa --model ... -T data_dir=DIR``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from inspect_ai import Task, task

from resafe.data.questions import load_questions
from resafe.errors import InputError
from resafe.evals.records import Side
from resafe.evals.sets import QuestionSet
from resafe.evals.tasks import question_task

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


def public_task(name: str, side: Side, data_dir: str | None, limit: int | None, max_new_tokens: int) -> Task:
    """The task of a public set; the score is the share refused.

    Raises:
        InputError: An unreadable set, or a data directory that is not there.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise InputError(f"there is no directory {data_dir}", "give the directory of the public sets' files")
    questions = load_questions(name, limit=limit, data_dir=Path(data_dir) if data_dir else None)
    return question_task(QuestionSet(name, side, tuple(questions), "refusal", max_new_tokens))


def _task_of(name: str, side: Side) -> Callable[..., Task]:
    def make(data_dir: str | None = None, limit: int | None = None, max_new_tokens: int = 64) -> Task:
        return public_task(name, side, data_dir, limit, max_new_tokens)

    make.__name__ = make.__qualname__ = name
    registered: Callable[..., Task] = task(name=name)(make)
    return registered


TASKS = {name: _task_of(name, side) for name, side in PUBLIC_TASKS.items()}
