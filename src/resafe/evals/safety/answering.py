"""Has every model answer every question, through Inspect: local ones in process, others through its providers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.checkpoints import Checkpoint, cache_root, load_tokenizer, resolve_dtype
from resafe.errors import InputError, ResafeError
from resafe.evals.degenerate import script
from resafe.evals.responses import ResponseStore, speaker_digest
from resafe.evals.run import check_log, run_tasks
from resafe.evals.safety.questions import Asked
from resafe.evals.safety.result import Answer
from resafe.evals.safety.settings import SafetySettings
from resafe.evals.safety.subjects import Subject
from resafe.evals.wrappers import wrap

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog
    from inspect_ai.model import GenerateConfig

Report = Callable[[int, int], None]
_LANGUAGES = {"latin": "en", "han": "zh", "devanagari": "hi"}


def answer_locally(
    subject: Subject, load: Callable[[Checkpoint], Any], asked: Sequence[Asked], settings: SafetySettings, device: str,
    log_dir: Path, report: Report | None,
) -> tuple[list[Answer], int, list[EvalLog]]:  # fmt: skip
    """A local model's answers; the model is loaded when one is not in the store.

    Returns:
        The answers, how many requests the store had already, and Inspect's logs.
    """
    from inspect_ai.model import GenerateConfig, Model

    from resafe.evals.provider import LocalModel

    checkpoint = subject.checkpoint
    assert checkpoint is not None
    turns = [len(wrap(one.wrapper, "x").turns) for one in asked for _ in one.questions.questions]
    waves = [sum(count > place for count in turns) for place in range(max(turns))]
    root = settings.store or cache_root() / "responses"
    precision = str(resolve_dtype(settings.dtype, device)).removeprefix("torch.")
    with ResponseStore(root, speaker_digest(checkpoint)) as store:
        api = LocalModel(
            subject.name, tokenizer=load_tokenizer(checkpoint), load=lambda: load(checkpoint), store=store,
            precision=precision, system=settings.system, batch_size=settings.batch_size, expected=waves,
            progress=report,
        )  # fmt: skip
        answers, logs = _through_inspect(subject, Model(api, GenerateConfig()), asked, settings, log_dir)
        reused = api.reused
        api.release()
    return answers, reused, logs


def answer_served(
    subject: Subject, asked: Sequence[Asked], settings: SafetySettings, log_dir: Path, report: Report | None
) -> tuple[list[Answer], list[EvalLog]]:
    """The answers of a model behind an endpoint, kept in Inspect's cache; one that fails for good has none.

    Raises:
        InputError: Inspect has no such provider, or it lacks a key or a package.
        ResafeError: Not one request was answered.
    """
    from inspect_ai.model import get_model

    try:
        model = get_model(subject.served, memoize=False)
    except Exception as error:  # the library raises what its providers raise: no key, no package, no such provider
        raise InputError(f"{subject.served}: {_said(error)}", "see Inspect's documentation of providers") from None
    answers, logs = _through_inspect(subject, model, asked, settings, log_dir, report, connections=settings.connections)
    if all(answer.response is None for answer in answers):
        raise ResafeError(
            f"{subject.served}: none of {len(answers)} requests was answered: {_why(logs[0])}",
            "check the address, the key and the model's name; for vllm/… install vllm",
        )
    return answers, logs


def _through_inspect(
    subject: Subject, model: Any, asked: Sequence[Asked], settings: SafetySettings, log_dir: Path,
    report: Report | None = None, connections: int | None = None,
) -> tuple[list[Answer], list[EvalLog]]:  # fmt: skip
    from resafe.evals.tasks import wrapped_task

    total = sum(len(one.questions.questions) for one in asked)
    responses: dict[tuple[str, str], str] = {}

    def noting(label: str) -> Callable[[str, str], None]:
        def note(question: str, response: str) -> None:
            responses[label, question] = response
            if report is not None:
                report(len(responses), total)

        return note

    served = connections is not None
    tasks = [
        wrapped_task(
            one.questions, one.wrapper, config=_config(settings, served), note=noting(one.label), cached=served
        )
        for one in asked
    ]
    extra: dict[str, Any] = {"fail_on_error": False} if served else {}
    logs = run_tasks(tasks, model, total, log_dir, connections=connections, **extra)
    for log in logs:
        check_log(subject.name, log)
    answers = [
        Answer(
            subject.name, one.questions.name, one.questions.side, one.wrapper, question.id, question.prompt,
            question.topic, _LANGUAGES.get(script(question.prompt) or ""), responses.get((one.label, question.id)),
        )
        for one in asked
        for question in one.questions.questions
    ]  # fmt: skip
    return answers, logs


def _config(settings: SafetySettings, served: bool) -> GenerateConfig:
    from inspect_ai.model import GenerateConfig

    config = GenerateConfig(temperature=settings.temperature, max_tokens=settings.max_new_tokens)
    if settings.temperature:
        config.top_p, config.seed = settings.top_p, settings.seed
        config.top_k = settings.top_k or None
    if served:
        config.max_retries = 5
        config.system_message = settings.system
    return config


def _why(header: EvalLog) -> str:
    """What the first sample that failed said."""
    from inspect_ai.log import read_eval_log

    failed = (sample.error for sample in read_eval_log(header.location).samples or [] if sample.error is not None)
    error = next(failed, None)
    return _said(error.message) if error is not None else "no reason was given"


def _said(error: object) -> str:
    """The error's last line, without the value of any key in the environment."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    for name, value in os.environ.items():
        if value and name.upper().endswith(("_KEY", "_TOKEN")):
            text = text.replace(value, f"${name}")
    return text[:300]
