"""The command-line application: verbs, global options, and errors as one clear message with an exit code."""

from __future__ import annotations

import logging
import sys
import warnings
from importlib import metadata
from typing import Annotated

import typer

from resafe.cli import align, fuse, judge, ls, mask, plan, realign, results, run, tune, validate, verify
from resafe.cli import eval as evaluation
from resafe.cli.console import print_error
from resafe.errors import ResafeError

app = typer.Typer(
    name="resafe",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"resafe {metadata.version('resafe')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="print the version, and end")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show where in the code an error comes from")] = False,
) -> None:
    """Restores the safety of fine-tuned language models through model fusion, and proves it by measurement."""


app.command("run")(run.run)
app.command("results")(results.results)
app.command("realign")(realign.realign)
app.command("fuse")(fuse.fuse)
app.command("align")(align.align)
app.command("tune")(tune.tune)
app.add_typer(evaluation.app, name="eval")
app.command("verify")(verify.verify)
app.command("plan")(plan.plan)
app.command("validate")(validate.validate)
app.command("ls")(ls.ls)
app.add_typer(mask.app, name="mask")
app.add_typer(judge.app, name="judge")


def main() -> None:
    """Runs the application. Exit codes: 0 done, 1 failed, 2 wrong input, 3 gate not met, 130 interrupted."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries; nothing a user can act on
    for name in ("torchao", "torch.utils._pytree"):  # no news: what torchao says of CUDA kernels when PEFT loads it
        logging.getLogger(name).setLevel(logging.ERROR)
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except ResafeError as error:
        if debug:
            raise
        print_error(error)
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, SystemExit) as stop:  # the library below turns an interrupt into an exit with 130
        if isinstance(stop, SystemExit) and stop.code != 130:
            raise
        sys.stderr.write("\ninterrupted; the same command goes on from the last finished stage\n")
        raise SystemExit(130) from None
