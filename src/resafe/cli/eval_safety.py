"""`resafe eval safety`: question sets, judges and red-team wrappers on one model or several."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from resafe.files import split_names

Models = Annotated[
    list[str],
    typer.Argument(help="NAME=MODEL or MODEL: path, org/name, base+adapter; vllm/…, openai-api/…, inspect:PROVIDER/…"),
]


def safety(
    models: Models,
    sets: Annotated[str, typer.Option(help="question sets or files with commas; see `resafe ls data`")] = "",
    harmless: Annotated[str, typer.Option(help="sets or files whose questions are harmless (over-refusal)")] = "",
    judges: Annotated[str, typer.Option(help="judges with commas: refusal, guard, embedded, llm-rubric …")] = "refusal",
    judge_set: Annotated[list[str] | None, typer.Option(help="JUDGE.setting=value (repeatable)")] = None,
    max_cost: Annotated[float | None, typer.Option(help="most money a judge may spend")] = None,
    wrappers: Annotated[
        str, typer.Option(help="none,cot,cou,suffix,prefill,role_play,multi_turn; harmful sets only")
    ] = "none",
    limit: Annotated[int | None, typer.Option(help="questions of each set, evenly over topics")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="most tokens of an answer")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="with a temperature: share of the likeliest tokens")] = 1.0,
    top_k: Annotated[int, typer.Option(help="with a temperature: the k likeliest tokens; 0 for all")] = 0,
    seed: Annotated[int, typer.Option(help="with a temperature: seed of the draws")] = 0,
    system: Annotated[str | None, typer.Option(help="system turn; default: the template's")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="directory of the public sets' files; no Hub then")] = None,
    dtype: Annotated[str, typer.Option(help="precision of weights: auto, float32, bfloat16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    batch_size: Annotated[str, typer.Option(help="prompts decoded together; auto measures")] = "auto",
    coherence: Annotated[
        str, typer.Option(help="checkpoint that measures responses' perplexity; first, none, auto (for harm judges)")
    ] = "auto",
    store: Annotated[Path | None, typer.Option(help="directory of stored responses; default: in the cache")] = None,
    connections: Annotated[int, typer.Option(help="most requests under way at an endpoint")] = 16,
    out: Annotated[Path | None, typer.Option(help="directory for tables, responses, verdicts, Inspect's logs")] = None,
    topics: Annotated[bool, typer.Option("--topics", help="tables by topic, too")] = False,
    corrected: Annotated[
        bool, typer.Option("--corrected", help="also rates corrected for the judges' errors, where calibrated")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the tables as Markdown")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Measure safety: who refuses, who answers harmfully. A killed run goes on; judging again never answers again."""
    from resafe.cli.console import ConsoleReporter
    from resafe.evals.safety import SafetySettings, evaluate_safety, subjects

    if not (sets or harmless):
        sets = "harmful,harmless"
    settings = SafetySettings(
        sets=split_names(sets), harmless=split_names(harmless), wrappers=split_names(wrappers),
        judges=split_names(judges), judge_settings=tuple(judge_set or ()), max_cost=max_cost, limit=limit,
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, system=system,
        data_dir=data_dir, dtype=_precision(dtype), device=device, batch_size=_batch_size(batch_size), store=store,
        coherence=coherence, connections=connections, corrected=corrected,
    )  # fmt: skip
    result = evaluate_safety(subjects(models), settings, out=out, reporter=ConsoleReporter(quiet=quiet))
    _print(result, topics, as_json, markdown)


def _print(result: Any, topics: bool, as_json: bool, markdown: bool) -> None:
    from resafe.cli.run import show
    from resafe.evals.safety.text import lines, markdown_text, rich_tables, to_json

    if as_json:
        found = to_json(result, topics=topics)
        sys.stdout.write(json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n")
    elif markdown:
        sys.stdout.write(markdown_text(result))
        if topics:
            sys.stdout.write("\n" + markdown_text(result, topics=True))
    else:
        for table in [*rich_tables(result), *(rich_tables(result, topics=True) if topics else [])]:
            show(table)
        for line in lines(result):
            typer.echo(line)


def _batch_size(text: str) -> Any:
    from resafe.errors import InputError

    if text != "auto" and not text.isdigit():
        raise InputError(f"--batch-size {text}", "give a number of prompts, or auto")
    return text if text == "auto" else int(text)


def _precision(text: str) -> Any:
    from resafe.errors import InputError

    if text not in ("auto", "float32", "bfloat16"):
        raise InputError(f"--dtype {text}", "give auto, float32 or bfloat16")
    return text
