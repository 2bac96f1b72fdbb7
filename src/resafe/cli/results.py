"""`resafe results`: the table of a finished run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def results(
    root: Annotated[Path, typer.Argument(help="a run directory, e.g. runs/demo")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object (docs/results-schema.md)")] = False,
    corrected: Annotated[bool, typer.Option("--corrected", help="rates corrected for the judge's errors")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="the table as Markdown")] = False,
) -> None:
    """Print the results of a run."""
    from resafe.errors import InputError
    from resafe.report import corrected as correct
    from resafe.report import markdown_table, read_results, to_json

    path = root / "results.json"
    if not path.is_file():
        raise InputError(f"{root}: no results there", "finish the run first: resafe run RECIPE --out " + str(root))
    found = read_results(path)
    if corrected:
        found = correct(found)
    if as_json:
        sys.stdout.write(json.dumps(to_json(found), ensure_ascii=False, allow_nan=False) + "\n")
    elif markdown:
        sys.stdout.write(markdown_table(found) + "\n")
    else:
        from resafe.cli.run import show_results

        show_results(found)
