"""`resafe tune`: fine-tunes a model on instruction data."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from resafe.cli.training import (
    AllowPickle,
    Alpha,
    AsJson,
    DataDir,
    Device,
    Dropout,
    Dtype,
    FourBit,
    Full,
    MaxBadShare,
    ModelReference,
    Out,
    OverlapHub,
    PresetName,
    Quiet,
    Rank,
    ReportTo,
    Seed,
    System,
    Targets,
    is_main,
    lora_values,
    show,
)
from resafe.settings import named_values


def tune(
    model: ModelReference,
    data: Annotated[
        list[str], typer.Argument(help="sets (resafe ls data), files, DIR/dataset_info.json:NAME, Hub ids")
    ],
    out: Out,
    preset: PresetName = "default",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="a setting: NAME=VALUE, e.g. steps=100 learning_rate=1e-4")
    ] = None,
    full: Full = None,
    rank: Rank = None,
    alpha: Alpha = None,
    targets: Targets = None,
    dropout: Dropout = None,
    examples: Annotated[int | None, typer.Option(help="train on this many rows")] = None,
    harmful_share: Annotated[float, typer.Option(help="share of harmful rows mixed in (data-poisoning study)")] = 0.0,
    harmful: Annotated[
        str, typer.Option(help="where those come from: embedded, or a set of safety pairs")
    ] = "embedded",
    hold_out: Annotated[float, typer.Option(help="share of the prompts not trained on")] = 0.0,
    data_dir: DataDir = None,
    max_bad_share: MaxBadShare = 0.01,
    keep_overlap: Annotated[
        bool, typer.Option("--keep-overlap", help="train also on rows that are in an evaluation set")
    ] = False,
    overlap_hub: OverlapHub = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="for sets larger than memory: tokens on disk beside OUT while training")
    ] = False,
    system: System = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    four_bit: FourBit = False,
    report_to: ReportTo = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on instructions (loss on the answers only). A killed run goes on where it stopped."""
    from resafe.cli.console import ConsoleReporter
    from resafe.training.verbs import Start
    from resafe.training.verbs import tune as run

    reporter = ConsoleReporter(quiet=quiet or not is_main())
    result = run(
        model, list(data), out=out, preset=preset, settings=named_values(setting, "--set"), examples=examples,
        harmful_share=harmful_share, harmful=harmful, hold_out=hold_out, data_dir=data_dir,
        max_bad_share=max_bad_share, keep_overlap=keep_overlap, overlap_hub=overlap_hub, stream=stream,
        start=Start(
            full=full, lora=lora_values(rank, alpha, targets, dropout), system=system, seed=seed, device=device,
            dtype=cast(Any, dtype), four_bit=four_bit, report_to=tuple(report_to or ()), allow_pickle=allow_pickle,
        ),
        progress=reporter.bar("tune", "steps"),
    )  # fmt: skip
    show(result, as_json)
