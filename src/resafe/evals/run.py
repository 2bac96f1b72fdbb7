"""Evaluates one model on question sets through Inspect and turns the verdicts into records.

Inspect is the record (its logs open in ``inspect view``); all that costs time and that a batch job has no use for
(realtime events, displays, servers) is off.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import InputError, ResafeError
from resafe.evals.generation import Progress
from resafe.evals.records import Record
from resafe.evals.sets import QuestionSet

if TYPE_CHECKING:
    from inspect_ai import Task
    from inspect_ai.log import EvalLog
    from inspect_ai.model import Model

    from resafe.evals.responses import ResponseStore
    from resafe.evals.scorers import Verdicts


def evaluate_model(
    *,
    name: str,
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, QuestionSet],
    system: str | None = None,
    log_dir: Path,
    max_new_tokens: int | None = None,
    batch_size: int = 128,
    store: ResponseStore | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Answers and scores all sets with one model; the questions of all sets are decoded together.

    Args:
        name: The model's name in records and logs.
        model: A causal language model of transformers, or a PEFT model around one.
        tokenizer: Its tokenizer, with a chat template.
        sets: Question sets by name; a record's `set` is the key.
        system: System turn: None for the template's default, "" for an empty one.
        log_dir: Where Inspect's logs go, one file a set; made if missing.
        max_new_tokens: Most tokens of an answer, in place of each set's own bound; None keeps those.
        batch_size: Most prompts that are decoded together.
        store: Where answers are kept as they come, so that a killed call goes on; the answers are the same either way.
        progress: Called with (answers done, questions in all).

    Returns:
        One record a question, in the order of `sets` and of their questions.

    Raises:
        InputError: No sets, or a set whose key is not its name.
        ResafeError: A task did not finish; the message says why and where its log is.
    """
    from inspect_ai.model import GenerateConfig, Model

    from resafe.evals.provider import LocalModel
    from resafe.evals.tasks import question_task

    if not sets:
        raise InputError(f"no question sets for model {name!r}", "give at least one")
    for key, questions in sets.items():
        if key != questions.name:
            raise InputError(f"question set {questions.name!r} is under the key {key!r}", "use its name as the key")
    total = sum(len(questions.questions) for questions in sets.values())
    api = LocalModel(
        name, loaded=model, tokenizer=tokenizer, system=system, batch_size=batch_size, expected=total,
        progress=progress, store=store, precision=str(getattr(model, "dtype", "")).removeprefix("torch."),
        whole_batches=True,
    )  # fmt: skip
    verdicts: dict[str, Verdicts] = {key: {} for key in sets}
    tasks = [question_task(questions, verdicts[key]) for key, questions in sets.items()]
    limit: dict[str, Any] = {} if max_new_tokens is None else {"max_tokens": max_new_tokens}
    logs = run_tasks(tasks, Model(api, GenerateConfig()), total, log_dir, **limit)
    api.release()
    for log in logs:
        check_log(name, log)
    return [record for key, questions in sets.items() for record in _records(name, questions, verdicts[key])]


def run_tasks(
    tasks: list[Task], model: Model, total: int, log_dir: Path, *, connections: int | None = None, **settings: Any
) -> list[EvalLog]:
    """Inspect's evaluation of tasks on one model, all at once, without its displays and servers.

    Args:
        tasks: The tasks.
        model: The model.
        total: Samples of all tasks.
        log_dir: Where the logs go, one file a task; made if missing.
        connections: Most requests under way; None is all.
        settings: Further arguments of Inspect's `eval`.

    Returns:
        The logs, without their samples.
    """
    from inspect_ai import eval as inspect_eval

    log_dir.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, Any] = {
        "log_format": "eval", "log_buffer": total, "log_realtime": False, "log_model_api": False,
        "log_header_only": True, "log_level": "error", "log_level_transcript": "error", "display": "none",
        "score_display": False, "ctl_server": False, "fail_on_error": True, "max_samples": total,
        "max_tasks": len(tasks), "max_connections": connections or total, "adaptive_connections": False,
    } | settings  # fmt: skip
    with quiet_inspect(), _rare_collections():
        return list(inspect_eval(tasks, model=model, log_dir=str(log_dir), **chosen))


def check_log(name: str, log: EvalLog) -> None:
    """Raises ResafeError where a task did not finish, with the reason and the log's place."""
    if log.status != "success":
        reason = log.error.message if log.error else f"its status is {log.status!r}"
        raise ResafeError(f"evaluation of {name!r} on {log.eval.task!r} failed: {reason}", f"see {log.location}")


def _records(name: str, questions: QuestionSet, verdicts: Verdicts) -> list[Record]:
    records = []
    for question in questions.questions:
        response, score = verdicts[question.id]
        records.append(
            Record(
                model=name,
                set=questions.name,
                side=questions.side,
                id=question.id,
                prompt=question.prompt,
                topic=question.topic,
                target=question.target,
                response=response,
                outcome=str(score.explanation),
                score=score.as_float(),
            )
        )
    return records


@contextmanager
def quiet_inspect() -> Iterator[None]:
    """Keeps Inspect from leaving its handlers and level on the root logger of the program it runs in."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Makes garbage collection rare: Inspect makes many small objects, and each pass would visit all of torch's."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
