"""`resafe realign`: restores one tuned model's safety with a method and writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from resafe.cli.training import MaxBadShare
from resafe.settings import named_values


def realign(
    aligned: Annotated[str, typer.Option(help="the aligned checkpoint: path, org/name, base+adapter, file.gguf")],
    tuned: Annotated[list[str], typer.Option(help="a tuned checkpoint; several are fused")],
    out: Annotated[Path, typer.Option(help="directory to write")],
    method: Annotated[str, typer.Option(help="see: resafe ls realign")] = "somf",
    setting: Annotated[list[str] | None, typer.Option("--set", help="a setting of the method: NAME=VALUE")] = None,
    strength: Annotated[float | None, typer.Option(help="default: 1 where the method has it, else the middle")] = None,
    fusion: Annotated[
        str | None, typer.Option(help="how several tuned models are combined; default: task_arithmetic")
    ] = None,
    pairs: Annotated[str, typer.Option(help="safety pairs: embedded, a set, a Hub id or a file")] = "embedded",
    harmless: Annotated[str, typer.Option(help="harmless requests with answers, likewise")] = "embedded",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="task examples to keep: a set, a Hub id or a file; give one for each tuned checkpoint"),
    ] = None,
    keep_limit: Annotated[int, typer.Option(min=1, help="the first so many examples of each are taken")] = 256,
    data_dir: Annotated[Path | None, typer.Option(help="directory with the files of public data sets")] = None,
    max_bad_share: MaxBadShare = 0.01,
    space: Annotated[str, typer.Option(help="auto, factors or weights (for adapters)")] = "auto",
    seed: Annotated[int, typer.Option(help="seed")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="precision of frozen weights: auto, float32, bfloat16")] = "auto",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="also read *.bin, as plain tensors")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Realign a tuned model: aligned + tuned → a model (or adapter) that refuses again and still knows its task."""
    from resafe.api import realign as run
    from resafe.cli.console import ConsoleReporter

    settings = named_values(setting, "--set")
    reporter = ConsoleReporter(quiet=quiet)
    written = run(
        aligned, list(tuned), method=method, out=out, settings=settings, strength=strength, fusion=fusion, pairs=pairs,
        harmless=harmless, keep=keep or None, keep_limit=keep_limit, data_dir=data_dir, max_bad_share=max_bad_share,
        space=space, seed=seed, device=device, dtype=cast(Any, dtype), allow_pickle=allow_pickle,
        progress=reporter.bar(method, "steps"),
    )  # fmt: skip
    typer.echo(str(written))
