"""`resafe align`: teaches a model to refuse the harmful and answer the harmless."""

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
from resafe.files import split_names
from resafe.settings import named_values


def align(
    model: ModelReference,
    out: Out,
    safety: Annotated[
        list[str] | None, typer.Option(help="safety pairs: embedded, a set, a file, a Hub id; may be repeated")
    ] = None,
    harmless: Annotated[
        list[str] | None, typer.Option(help="instructions with helpful answers: embedded, a set, a file, a Hub id")
    ] = None,
    preset: PresetName = "default",
    stages: Annotated[str, typer.Option(help="sft,dpo or sft or dpo")] = "sft,dpo",
    sft: Annotated[list[str] | None, typer.Option("--sft", help="a setting of the SFT: NAME=VALUE")] = None,
    dpo: Annotated[
        list[str] | None, typer.Option("--dpo", help="a setting of the DPO: NAME=VALUE, e.g. beta=0.05")
    ] = None,
    full: Full = None,
    rank: Rank = None,
    alpha: Alpha = None,
    targets: Targets = None,
    dropout: Dropout = None,
    examples: Annotated[
        int | None, typer.Option(help="size of the SFT mix; default: as many as there are pairs")
    ] = None,
    refusal_share: Annotated[float, typer.Option(help="share of the SFT mix on harmful requests")] = 0.45,
    data_dir: DataDir = None,
    max_bad_share: MaxBadShare = 0.01,
    overlap_hub: OverlapHub = False,
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
    """Align a model: SFT, then DPO. A killed run goes on where it stopped."""
    from resafe.cli.console import ConsoleReporter
    from resafe.training.verbs import Start
    from resafe.training.verbs import align as run

    reporter = ConsoleReporter(quiet=quiet or not is_main())
    result = run(
        model, out=out, safety=safety or ["embedded"], harmless=harmless or ["embedded"], preset=preset,
        stages=split_names(stages), sft=named_values(sft, "--sft"),
        dpo=named_values(dpo, "--dpo"), examples=examples, refusal_share=refusal_share, data_dir=data_dir,
        max_bad_share=max_bad_share, overlap_hub=overlap_hub,
        start=Start(
            full=full, lora=lora_values(rank, alpha, targets, dropout), system=system, seed=seed, device=device,
            dtype=cast(Any, dtype), four_bit=four_bit, report_to=tuple(report_to or ()), allow_pickle=allow_pickle,
        ),
        progress=reporter.bar("align", "steps"),
    )  # fmt: skip
    show(result, as_json)
