"""`resafe eval`: the sub-application of measurements; each command is a file of its own."""

from __future__ import annotations

import typer

from resafe.cli import eval_safety, eval_utility

app = typer.Typer(help="Measure models.", no_args_is_help=True)
app.command("safety")(eval_safety.safety)
app.command("utility")(eval_utility.utility)


@app.callback()
def _eval() -> None:
    """Measure models: their safety, and their usefulness on downstream tasks."""
