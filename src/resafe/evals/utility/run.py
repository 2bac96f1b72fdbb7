"""Runs tasks of lm-eval on one model and turns its results into scores and records."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

from resafe.errors import InputError
from resafe.evals.records import Record
from resafe.evals.utility.names import check_request, task_names
from resafe.evals.utility.results import TaskScore, UtilityResult

_METRICS = ("acc", "exact_match", "pass@1")
"""Which metric scores an item, first found first; else the task's first one."""


class Request(TypedDict, total=False):
    """How tasks are asked.

    Attributes:
        data_dir: Directory of local files; with it there is no network access.
        limit: Most items of each task, the first ones; or a number for some tasks by name.
        fewshot: Worked examples in each prompt; None is each task's own number.
        chat: Put prompts through the tokenizer's chat template; lm-eval's default is not to.
        system: System turn, with `chat`.
        max_new_tokens: Most tokens of a written answer; None is each task's own number.
        allow_code_execution: Run the programs that the model writes (HumanEval), in a sandbox.
        allow_unconfined_code: Run them also where the kernel has no namespaces to shut them in: they could then reach
            the network and files.
    """

    data_dir: Path | None
    limit: int | Mapping[str, int] | None
    fewshot: int | None
    chat: bool
    system: str | None
    max_new_tokens: int | None
    allow_code_execution: bool
    allow_unconfined_code: bool


def evaluate_utility(
    name: str,
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 32,
    progress: Any = None,
    **request: Unpack[Request],
) -> UtilityResult:
    """Measures a model in memory on tasks of lm-eval.

    Args:
        name: The model's name in records.
        model: A causal language model of transformers, or a PEFT model around one.
        tokenizer: Its tokenizer.
        tasks: lm-eval's names, see `TASKS` for those that have local files.
        batch_size: Most prompts that are decoded together.
        progress: Called with (requests done, requests in all).
        request: See `Request`.

    Returns:
        lm-eval's figures and a record an item.

    Raises:
        InputError: An unknown task, missing rows, or programs without leave to run.
        ResafeError: Programs that cannot be shut in here, without leave to run unconfined.
    """
    from resafe.evals.utility.lm import LoadedLM

    return evaluate_lm(name, LoadedLM(model, tokenizer, batch_size=batch_size, progress=progress), tasks, **request)


def evaluate_lm(name: str, lm: Any, tasks: Sequence[str], **request: Unpack[Request]) -> UtilityResult:
    """As `evaluate_utility`, on any model of lm-eval (an `lm_eval.api.model.LM`), such as its vLLM class."""
    data_dir, limit, fewshot = request.get("data_dir"), request.get("limit"), request.get("fewshot")
    names = task_names(tasks)
    check_request(names, limit, fewshot)
    start = time.monotonic()
    code = None
    if request.get("allow_code_execution"):
        from resafe.evals.utility.code import SandboxedCode

        code = SandboxedCode(unconfined=request.get("allow_unconfined_code", False))
    with offline(data_dir is not None), _quiet():
        from resafe.evals.utility.tasks import load_tasks

        loaded = load_tasks(names, data_dir=data_dir, fewshot=fewshot, code=code)
        if (most := request.get("max_new_tokens")) is not None:
            _shorten(loaded, most)
        raw = _evaluate(lm, loaded, limit, request.get("chat", False), request.get("system"))
    scores = tuple(_scores(name, raw))
    records = tuple(record for task, items in raw["samples"].items() for record in _records(name, task, items))
    return UtilityResult(name, scores, records, code.summary() if code else {}, time.monotonic() - start)


def _shorten(loaded: dict[str, Any], max_new_tokens: int) -> None:
    """Bounds the answers of the tasks that have some written; lm-eval's own numbers are for models that stop."""
    for task in loaded["tasks"].values():
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": max_new_tokens}, update=True)


def _evaluate(
    lm: Any, loaded: dict[str, Any], limit: int | Mapping[str, int] | None, chat: bool, system: str | None
) -> dict[str, Any]:
    """lm-eval's `evaluate`, with the seeds of its `simple_evaluate`."""
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate

    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    samples = None
    if isinstance(limit, Mapping):
        tasks = loaded["tasks"]
        samples = {
            task: list(range(min(limit.get(task, len(found.eval_docs)), len(found.eval_docs))))
            for task, found in tasks.items()
        }
    results = evaluate(
        lm=lm, task_dict=loaded, limit=limit if isinstance(limit, int) else None, samples=samples,
        bootstrap_iters=1000, log_samples=True, apply_chat_template=chat, system_instruction=system,
        confirm_run_unsafe_code=True,
    )  # fmt: skip  # tasks that run programs were refused before, or run them in the sandbox
    if results is None:
        raise InputError("lm-eval gave no results", "run in one process")
    return dict(results)


def _scores(name: str, raw: dict[str, Any]) -> Iterator[TaskScore]:
    for task, figures in {**raw.get("groups", {}), **raw["results"]}.items():
        counts = raw.get("n-samples", {}).get(task, {})
        for key, value in figures.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{metric}_stderr,{chosen}")
            yield TaskScore(
                model=name,
                task=task,
                metric=metric,
                filter=chosen,
                value=float(value),
                stderr=float(error) if isinstance(error, (int, float)) else None,
                n=int(counts.get("effective", figures.get("sample_len", 0)) or 0),
                fewshot=int(raw.get("n-shot", {}).get(task) or 0),
            )


def _records(model: str, task: str, items: list[dict[str, Any]]) -> Iterator[Record]:
    filters = {item["filter"] for item in items}
    for item in items:
        metric = next((name for name in _METRICS if name in item), None)
        if metric is None or not isinstance(item[metric], (int, float)):
            continue  # a figure of the whole set, such as perplexity, has no items
        score = float(item[metric])
        prompt, response, target = _texts(item)
        yield Record(
            model=model,
            set=task if len(filters) == 1 else f"{task}:{item['filter']}",
            side="task",
            id=str(item["doc_id"]),
            prompt=prompt,
            topic="",
            target=target,
            response=response,
            outcome="correct" if score == 1.0 else "wrong",
            score=score,
        )


def _texts(item: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt, the model's answer and the right one. Among choices the answer is the most likely one."""
    arguments = [tuple(argument) for argument in item["arguments"]]
    prompt, target = str(arguments[0][0]), item["target"]
    first = item["filtered_resps"][0]
    if isinstance(first, (list, tuple)) and len(first) == 2 and isinstance(first[1], bool):
        choices = [str(argument[1]) for argument in arguments]
        best = max(range(len(choices)), key=lambda place: item["filtered_resps"][place][0])
        prompt = prompt or _common_beginning(choices)
        right = choices[target] if isinstance(target, int) and 0 <= target < len(choices) else str(target)
        return prompt, choices[best].strip(), right.strip()
    raw = item["resps"][0][0]
    return prompt, str(raw), str(target).strip()


def _common_beginning(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    shared = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:shared]


@contextmanager
def offline(active: bool) -> Iterator[None]:
    """In it, Hugging Face's libraries touch no network, whether they were imported before or not."""
    if not active:
        yield
        return
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    import huggingface_hub.constants as hub

    flag, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = flag
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval's remarks and bars off the terminal; errors stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    import tqdm

    original = tqdm.tqdm.__init__

    def silent(self: Any, *args: Any, **settings: Any) -> None:
        original(self, *args, **{**settings, "disable": True})

    tqdm.tqdm.__init__ = silent
    try:
        yield
    finally:
        logger.setLevel(level)
        tqdm.tqdm.__init__ = original
