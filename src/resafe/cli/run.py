"""`resafe run`: executes a recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from resafe.report import Results


def run(
    recipe: Annotated[Path, typer.Argument(help="a recipe, e.g. recipes/demo.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="fields to set: align.sft.steps=50 seed=1")] = None,
    out: Annotated[Path | None, typer.Option(help="run directory; default: runs/NAME")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; default: as the recipe says")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="directory with the files of public data sets")] = None,
    scale: Annotated[str | None, typer.Option(help="a section of the recipe's `scale`, e.g. smoke")] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="run programs that models write (HumanEval), in a sandbox")
    ] = False,
    allow_unconfined_code: Annotated[
        bool,
        typer.Option("--allow-unconfined-code", help="run them even where they could reach network and files"),
    ] = False,
    corrected: Annotated[
        bool, typer.Option("--corrected", help="page and workbook with rates corrected for the judge's errors, too")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the results as one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Run a recipe: align, tune, realign, evaluate, report. Finished stages are skipped; a killed run goes on."""
    from resafe.cli.console import ConsoleReporter
    from resafe.recipe import load_recipe

    changes = list(overrides or [])
    if device is not None:
        changes.append(f"device={device}")
    if data_dir is not None:
        changes.append(f"data.data_dir={json.dumps(str(data_dir))}")  # quoted: a path may look like another value
    if corrected:
        changes.append("report.corrected=true")
    loaded = load_recipe(recipe, changes, scale)
    root = out or Path("runs") / (f"{loaded.name}-{scale}" if scale else loaded.name)
    reporter = ConsoleReporter(quiet=quiet)
    reporter.say(f"{loaded.title or loaded.name} → {root}")
    from resafe.recipe.run import run_recipe
    from resafe.report import to_json

    outcome = run_recipe(
        loaded, root, reporter, allow_code_execution=allow_code_execution, allow_unconfined_code=allow_unconfined_code
    )
    if as_json:
        sys.stdout.write(json.dumps(to_json(outcome.results), ensure_ascii=False, allow_nan=False) + "\n")
        return
    if outcome.redone == 0:
        reporter.say("nothing to do: every stage was already done with these settings")
    show_results(outcome.results)
    files = {"page": "report.html", "workbook": "results.xlsx", "records": "results.jsonl"}
    files |= {"model": "model", "adapter": "adapter"}
    lines = [f"{what:9} {root / file}\n" for what, file in files.items() if (root / file).exists()]
    sys.stdout.write("\n" + "".join(lines))


def show_results(results: Results) -> None:
    """Prints the table of a run, and that of the tasks of lm-eval where any were measured."""
    from resafe.report import benchmark_table, rich_table

    show(rich_table(results))
    benchmarks = benchmark_table(results)
    if benchmarks is not None:
        show(benchmarks)


def show(table: object) -> None:
    """Prints a rich table: as wide as the terminal, or 140 columns where there is none."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
