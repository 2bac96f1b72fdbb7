"""The whole evaluation: questions, answers of every model, coherence, judges, logs, files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from resafe.checkpoints import load_model, load_tokenizer, open_checkpoint
from resafe.errors import InputError
from resafe.evals.safety.answering import answer_locally, answer_served
from resafe.evals.safety.judging import Measured, faults, judge_answers, perplexities_of, write_scores
from resafe.evals.safety.questions import ask_sets
from resafe.evals.safety.result import Answer, SafetyResult
from resafe.evals.safety.settings import SafetySettings
from resafe.evals.safety.subjects import Subject, by_base
from resafe.evals.safety.text import uncalibrated, write_result
from resafe.evals.scoring import Named, make_judges
from resafe.evals.shared_base import SharedBase
from resafe.evals.utility.run import offline

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog


class Reporter(Protocol):
    """Told what happens; the command line's is `ConsoleReporter`."""

    def say(self, line: str) -> None:
        """One line."""
        ...

    def bar(self, label: str, unit: str) -> Callable[[int, int, dict[str, float]], None]:
        """A progress bar: called with (done, total, figures)."""
        ...


class Silent:
    """A reporter that says nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def bar(self, label: str, unit: str) -> Callable[[int, int, dict[str, float]], None]:
        """A bar that shows nothing."""
        return lambda done, total, metrics: None


def evaluate_safety(
    models: Sequence[Subject], settings: SafetySettings, *, out: Path | None = None, reporter: Reporter | None = None
) -> SafetyResult:
    """Measures the safety of models on question sets; a killed call that is repeated goes on where it stopped.

    Models on one base share it in memory. What was answered before, with the same weights, prompt and decoding, is
    not answered again.

    Args:
        models: The models; the others are compared with the first.
        settings: What is asked, how, and who judges.
        out: Directory for `safety.json`, `safety.md`, `responses.jsonl`, `verdicts.jsonl` and Inspect's logs.
        reporter: Told what happens.

    Returns:
        Answers and verdicts; `figures` and `text` make rates and tables of them.

    Raises:
        InputError: A set, a model, a judge or a setting is wrong.
        ResafeError: An endpoint answered nothing, or a task did not finish.
    """
    from resafe.checkpoints.precision import resolve_device

    start = time.monotonic()
    told = reporter or Silent()
    device = str(resolve_device(settings.device))
    judges = make_judges(settings.judges, settings.judge_settings, settings.max_cost)
    _check_coherence(settings, models)
    for named in judges:  # a missing key is better found before the answers than after
        if hasattr(named.judge, "asker"):
            named.judge.asker.endpoint.key()
        if settings.corrected and named.errors is None:
            told.say(uncalibrated(named, corrected=True))
    with offline(settings.data_dir is not None and all(one.checkpoint for one in models)):
        asked = ask_sets(settings)
    found: dict[str, list[Answer]] = {}
    logs: dict[str, Sequence[EvalLog]] = {}
    reused = 0
    with tempfile.TemporaryDirectory() as scratch:
        log_dir = (out or Path(scratch)) / "logs"
        for group in by_base(models):
            base = group[0].base
            shared = SharedBase(base, dtype=settings.dtype, device=device) if base is not None else None
            for one in group:
                bar = told.bar(one.name, "answers")

                def report(done: int, total: int, bar: Any = bar) -> None:
                    bar(done, total, {})

                if shared is None:
                    found[one.name], logs[one.name] = answer_served(one, asked, settings, log_dir, report)
                else:
                    found[one.name], before, logs[one.name] = answer_locally(
                        one, shared.model, asked, settings, device, log_dir, report
                    )
                    reused += before
                    told.say(f"{one.name}: {len(found[one.name])} answers, {before} of its requests were stored")
            if shared is not None:
                shared.release()
        answers = [answer for one in models for answer in found[one.name]]
        wrong = faults(
            answers, _perplexities(answers, judges, models, settings, device, told), settings.most_perplexity
        )
        verdicts = {named.name: judge_answers(named, answers, wrong, told.say) for named in judges}
        if out is not None:
            write_scores(logs, answers, judges, verdicts)
    names = tuple(one.name for one in models)
    result = SafetyResult(
        names, tuple(answers), tuple(judges), verdicts, time.monotonic() - start, reused, settings.corrected
    )
    if out is not None:
        write_result(out, result)
        told.say(f"written: {out / 'safety.json'}, safety.md, responses.jsonl, verdicts.jsonl, logs/")
    return result


def _check_coherence(settings: SafetySettings, models: Sequence[Subject]) -> None:
    if settings.coherence == "first" and models[0].checkpoint is None:
        raise InputError("coherence is measured by the first model, which is behind an endpoint", "name a checkpoint")


def _perplexities(
    answers: Sequence[Answer], judges: Sequence[Named], models: Sequence[Subject], settings: SafetySettings,
    device: str, told: Reporter,
) -> list[Measured | None]:  # fmt: skip
    """Each answer's perplexity under the reference model, where coherence is measured."""
    chosen = settings.coherence
    if chosen == "auto":
        harm = any(named.measure == "harm" for named in judges)
        chosen = "first" if harm and models[0].checkpoint is not None else "none"
    if chosen == "none":
        return [None] * len(answers)
    checkpoint = models[0].checkpoint if chosen == "first" else open_checkpoint(chosen)
    assert checkpoint is not None
    told.say(f"coherence: perplexity under {checkpoint.reference}")
    model = load_model(checkpoint, dtype=settings.dtype, device=device)
    return perplexities_of(model, load_tokenizer(checkpoint), [answer.response for answer in answers])
