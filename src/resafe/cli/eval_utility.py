"""`resafe eval utility`: downstream tasks of lm-eval on one model or several."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from resafe.checkpoints import Checkpoint
    from resafe.evals.utility import UtilityResult


def utility(
    models: Annotated[list[str], typer.Argument(help="NAME=CHECKPOINT or CHECKPOINT: path, org/name, base+adapter …")],
    tasks: Annotated[
        str, typer.Option(help="lm-eval's names with commas: copa,xcopa_zh,xnli_hi,gsm8k,humaneval,mmlu …")
    ] = "copa,xcopa_zh,xnli_hi,gsm8k",
    data_dir: Annotated[Path | None, typer.Option(help="local files instead of the Hub, and no network at all")] = None,
    limit: Annotated[list[str] | None, typer.Option(help="first items only: N, or TASK=N (repeatable)")] = None,
    fewshot: Annotated[int | None, typer.Option(help="worked examples a prompt; default: each task's own")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put prompts through the chat template")] = False,
    system: Annotated[str | None, typer.Option(help="system turn, with --chat")] = None,
    engine: Annotated[str, typer.Option(help="transformers, or vllm (lm-eval's class)")] = "transformers",
    batch_size: Annotated[int, typer.Option(min=1, help="prompts that are decoded together (transformers)")] = 32,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="run the programs the model writes, in a sandbox")
    ] = False,
    allow_unconfined_code: Annotated[
        bool,
        typer.Option("--allow-unconfined-code", help="run them even where they could reach network and files"),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda (transformers)")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="precision of weights: auto, float32 (default; vllm: auto), bfloat16")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="directory for utility.json and records.jsonl")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the table as Markdown")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Measure usefulness: tasks of lm-eval; several models are compared item by item with the first."""
    from resafe.cli.console import ConsoleReporter
    from resafe.errors import InputError
    from resafe.evals.utility.names import check_request, check_tasks, task_names
    from resafe.evals.utility.run import offline
    from resafe.evals.utility.tasks import check_known

    named = [_named(text) for text in models]
    if len({name for name, _ in named}) < len(named):
        raise InputError("two models have the same name", "name them: base=PATH tuned=PATH")
    if engine not in ("transformers", "vllm"):
        raise InputError(f"--engine {engine}", "it is transformers or vllm")
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"--data-dir {data_dir}: no such directory", "leave it out to load from the Hub")
    if system is not None and not chat:
        raise InputError("--system without --chat", "a system turn needs the chat template: add --chat")
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file", "give a directory")
    names, limits = task_names([tasks]), _limits(limit or [])
    check_request(names, limits, fewshot)
    check_tasks(names, data_dir, allow_code_execution, allow_unconfined_code)
    with offline(data_dir is not None):
        check_known(names)
    settings: dict[str, Any] = {
        "data_dir": data_dir, "limit": limits, "fewshot": fewshot, "chat": chat, "system": system,
        "allow_code_execution": allow_code_execution, "allow_unconfined_code": allow_unconfined_code,
    }  # fmt: skip
    reporter = ConsoleReporter(quiet=quiet)
    results: list[UtilityResult] = []
    with offline(data_dir is not None):  # headers only: a wrong name is found before anything is measured
        from resafe.checkpoints import open_checkpoint

        opened = [(name, open_checkpoint(reference)) for name, reference in named]
    for name, checkpoint in opened:
        reporter.say(f"{name}: {checkpoint.reference}")
        measure = _vllm if engine == "vllm" else _transformers
        found = measure(name, checkpoint, names, settings, batch_size, device, dtype, reporter)
        if found.code:
            reporter.say(f"programs ran with {found.code['protection']}")
        results.append(found)
        if out is not None:  # after each model: what is measured is kept whatever comes
            from resafe.evals.utility.results import write_utility

            write_utility(out, results)
    if out is not None:
        reporter.say(f"written: {out / 'utility.json'}, {out / 'records.jsonl'}")
    if as_json:
        payload = {"models": [result.to_json() for result in results]}
        sys.stdout.write(json.dumps(payload, ensure_ascii=False, allow_nan=False) + "\n")
        return
    from resafe.evals.utility.table import markdown_text, rich_text

    if markdown:
        sys.stdout.write(markdown_text(results) + "\n")
    else:
        from resafe.cli.run import show

        show(rich_text(results))


def _named(text: str) -> tuple[str, str]:
    """(name, reference); an existing path that holds a "=" is a path."""
    name, sign, reference = text.partition("=")
    if sign and "/" not in name and not Path(text).exists():
        return name, reference
    return text, text


def _limits(given: list[str]) -> int | dict[str, int] | None:
    from resafe.errors import InputError

    limits: dict[str, int] = {}
    for item in given:
        task, _, number = item.rpartition("=")
        if not number.isdigit() or (not task and len(given) > 1):
            raise InputError(f"--limit {item}", "give one number for all tasks, or TASK=NUMBER for some")
        limits[task] = int(number)
    return limits.get("", limits or None)


def _transformers(
    name: str, checkpoint: Checkpoint, tasks: list[str], settings: dict[str, Any], batch: int, device: str,
    dtype: str | None, say: Any,
) -> UtilityResult:  # fmt: skip
    from resafe.evals.utility.run import offline

    with offline(settings["data_dir"] is not None):
        from resafe.checkpoints import load_model, load_tokenizer
        from resafe.checkpoints.precision import resolve_device
        from resafe.evals.utility import evaluate_utility

        model = load_model(checkpoint, dtype=cast(Any, dtype or "float32"), device=resolve_device(device))
        bar = say.bar(name, "requests")
        return evaluate_utility(
            name, model, load_tokenizer(checkpoint), tasks, batch_size=batch,
            progress=lambda done, total: bar(done, total, {}), **settings,
        )  # fmt: skip


def _vllm(
    name: str, checkpoint: Checkpoint, tasks: list[str], settings: dict[str, Any], batch: int, device: str,
    dtype: str | None, say: Any,
) -> UtilityResult:  # fmt: skip
    from resafe.errors import InputError
    from resafe.evals.utility.run import evaluate_lm, offline
    from resafe.evals.utility.vllm import vllm_arguments

    arguments = vllm_arguments(checkpoint, dtype or "auto")
    try:
        import vllm  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
        from lm_eval.api.registry import get_model
    except ImportError as error:
        raise InputError(f"--engine vllm: {error}", "pip install vllm, on a machine with a GPU") from error
    with offline(settings["data_dir"] is not None):
        lm = get_model("vllm").create_from_arg_obj(arguments, {"batch_size": "auto"})
        return evaluate_lm(name, lm, tasks, **settings)
