"""`resafe judge`: score stored responses, train the embedded judge, calibrate judges on labelled rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resafe.files import split_names

if TYPE_CHECKING:
    from resafe.evals.labelled import Labelled
    from resafe.evals.scoring import Named

app = typer.Typer(help="Judges: score responses, train and calibrate.", no_args_is_help=True)

Settings = Annotated[list[str] | None, typer.Option("--set", "-s", help="name=value, or judge.name=value (repeatable)")]
DataDir = Annotated[Path | None, typer.Option(help="directory with the published sets' files")]
MaxCost = Annotated[float | None, typer.Option(help="most money a judge may spend, with price_in and price_out")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress")]
MeasureOption = Annotated[str | None, typer.Option("--measure", help="what labels 1 and 0 say: refusal or harm")]


@app.command()
def score(
    responses: Annotated[Path, typer.Argument(help=".jsonl, .json, .csv with prompt, response; or Inspect's .eval")],
    judge: Annotated[list[str], typer.Option("--judge", "-j", help="a judge's name (repeatable)")],
    settings: Settings = None,
    max_cost: MaxCost = None,
    out: Annotated[Path | None, typer.Option(help="file for the verdicts, one JSON object a line")] = None,
    corrected: Annotated[bool, typer.Option("--corrected", help="rates corrected for the judge's errors")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Judge stored responses with one judge or several."""
    from resafe.cli.console import ConsoleReporter
    from resafe.evals.scoring import agreements, comparisons, estimates, make_judges, rates, read_responses
    from resafe.evals.scoring import score as run
    from resafe.evals.scoring.text import comparison_lines, payload, rate_table, write_verdicts

    reporter = ConsoleReporter(quiet=quiet)
    found = read_responses(responses)
    judges = make_judges(judge, settings or [], max_cost)
    for line in estimates(judges, found):
        reporter.say(f"estimate: {line}")
    for named in judges if corrected else []:
        rates(named, [], [], corrected=True)  # says what is missing before anything is spent
    verdicts = run(judges, found, reporter.say)
    table = {named.name: rates(named, found, verdicts[named.name], corrected=corrected) for named in judges}
    compared = {named.name: comparisons(named, found, verdicts[named.name]) for named in judges}
    agreed = agreements(judges, found, verdicts)
    if out is not None:
        write_verdicts(out, found, verdicts)
        reporter.say(f"written: {out}")
    if as_json:
        _print_json(payload(judges, table, compared, agreed, corrected))
        return
    _show(rate_table(judges, table, corrected))
    for line in [*_known(judges), *comparison_lines(compared), *agreed]:
        typer.echo(line)


@app.command()
def train(
    rows: Annotated[list[Path] | None, typer.Argument(help="files with prompt, response, label")] = None,
    sets: Annotated[str, typer.Option(help="published sets with commas: xstest,pku_saferlhf,beavertails …")] = "",
    data_dir: DataDir = None,
    keep_out: Annotated[str, typer.Option(help="published sets to calibrate on: their prompts are left out")] = "",
    measure: MeasureOption = None,
    local: Annotated[str | None, typer.Option(help="a model whose hidden states judge harm too; slow")] = None,
    out: Annotated[Path | None, typer.Option(help="directory of the judge; default: in the cache")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train the embedded judge on labelled rows; its figures by cross-validation are printed and kept."""
    from resafe.cli.console import ConsoleReporter
    from resafe.errors import InputError
    from resafe.evals.calibration.store import merged, remember, to_json
    from resafe.evals.embedded import LocalModel, default_place, train_judge, write_trained
    from resafe.evals.labelled import load_labelled, overlap_key

    reporter = ConsoleReporter(quiet=quiet)
    labelled = _labelled(rows or [], sets, data_dir, measure)
    if not labelled:
        raise InputError("there is nothing to train on", "give files, or --sets xstest --data-dir DIRECTORY")
    keys = {overlap_key(row.prompt) for name in split_names(keep_out) for row in load_labelled(name, data_dir)}
    model = LocalModel.open(local) if local else None
    result = train_judge(labelled, keep_out=keys, local=model, say=reporter.say)
    place = out or default_place()
    write_trained(place, result.judge)
    if result.dropped:
        reporter.say(f"{result.dropped} rows were left out: their prompts are kept for calibrating")
    digest = {"model": f"sha256:{result.judge.digest}"}
    found = [
        merged("embedded" if of == "refusal" else "embedded-harm", digest, of, figures)
        for of, figures in result.measured.items()
    ]
    for calibration in found:
        remember(calibration)
    if as_json:
        _print_json({"judge": str(place), **result.judge.facts, "measured": [to_json(one) for one in found]})
        return
    for calibration in found:
        _calibration_table(calibration, f"AUC {result.auc[calibration.measure]:.3f} over all rows")
    typer.echo(str(place))


@app.command()
def calibrate(
    judge: Annotated[str, typer.Argument(help="a judge's name")],
    rows: Annotated[list[Path] | None, typer.Option(help="a file with prompt, response, label (repeatable)")] = None,
    sets: Annotated[str, typer.Option(help="published sets with commas; default: all that the judge measures")] = "",
    data_dir: DataDir = None,
    settings: Settings = None,
    max_cost: MaxCost = None,
    measure: MeasureOption = None,
    out: Annotated[Path | None, typer.Option(help="file for the figures too; the cache gets them always")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure how far a judge agrees with people; reports then print its recall beside the rates it gave."""
    from resafe.cli.console import ConsoleReporter
    from resafe.evals.calibration import remember, to_json, write_calibration
    from resafe.evals.calibration.command import calibrate_named

    reporter = ConsoleReporter(quiet=quiet)
    own = [(path.stem, _labelled([path], "", None, measure)) for path in rows or []]
    found, notes = calibrate_named(
        judge, own, list(split_names(sets)), data_dir, settings or [], max_cost, reporter.say
    )
    for note in notes:
        reporter.say(note)
    place = remember(found)
    if out is not None:
        write_calibration(out, found)
    reporter.say(f"written: {out or place}")
    if as_json:
        _print_json(to_json(found))
    else:
        _calibration_table(found)


def _labelled(files: list[Path], sets: str, data_dir: Path | None, measure: str | None) -> list[Labelled]:
    from resafe.errors import InputError
    from resafe.evals.labelled import load_labelled, read_labelled

    if measure not in (None, "refusal", "harm"):
        raise InputError(f"--measure {measure}", "it is refusal or harm")
    found: list[Labelled] = []
    for path in files:
        found += read_labelled(path, measure)  # type: ignore[arg-type]
    for name in split_names(sets):
        found += load_labelled(name, data_dir)
    return found


def _known(judges: list[Named]) -> list[str]:
    from resafe.evals.calibration.text import sentence

    return [sentence(named.calibration) for named in judges if named.calibration is not None]


def _calibration_table(calibration: Any, caption: str = "") -> None:
    from rich.table import Table

    from resafe.evals.calibration.text import HEADS, table

    shown = Table(title=f"{calibration.judge}: {calibration.measure}", caption=caption or None, box=None)
    for head in HEADS:
        shown.add_column(head, overflow="fold")
    for row in table(list(calibration.sets.values())):
        shown.add_row(*row)
    _show(shown)


def _show(table: Any) -> None:
    from resafe.cli.run import show

    show(table)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
