"""What `resafe align` and `resafe tune` share: options, NAME=VALUE settings, and what is printed at the end."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from resafe.files import split_names

ModelReference = Annotated[
    str, typer.Argument(help="model or adapter to start from: path, org/name, base+adapter, file.gguf")
]
Out = Annotated[Path, typer.Option(help="directory to write")]
PresetName = Annotated[
    str, typer.Option(help="settings by name: default, smollm2, llama3, qwen3, gemma3, wizardlm-7b, …")
]
Full = Annotated[bool | None, typer.Option("--full/--lora", help="all weights, or an adapter; default: the preset's")]
Rank = Annotated[int | None, typer.Option(help="rank of a fresh adapter")]
Alpha = Annotated[float | None, typer.Option(help="its alpha; default: twice the rank")]
Targets = Annotated[str | None, typer.Option(help="all-linear, module names with commas, or a regular expression")]
Dropout = Annotated[float | None, typer.Option(help="LoRA dropout")]
DataDir = Annotated[Path | None, typer.Option(help="directory with the files of public data sets")]
MaxBadShare = Annotated[float, typer.Option(help="stop if a larger share of a set's rows is unusable")]
OverlapHub = Annotated[
    bool, typer.Option("--overlap-hub", help="compare also with evaluation sets that are not at hand, from the Hub")
]
System = Annotated[str | None, typer.Option(help="system turn; default: the template's own")]
Seed = Annotated[int, typer.Option(help="seed")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Dtype = Annotated[str, typer.Option(help="precision of frozen weights: auto, float32, bfloat16")]
FourBit = Annotated[bool, typer.Option("--four-bit", help="frozen weights in 4 bits (CUDA, bitsandbytes)")]
ReportTo = Annotated[list[str] | None, typer.Option(help="trackers: wandb, tensorboard, …")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="also read *.bin, as plain tensors")]
AsJson = Annotated[bool, typer.Option("--json", help="print the figures as one JSON object")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress")]


def lora_values(rank: int | None, alpha: float | None, targets: str | None, dropout: float | None) -> dict[str, Any]:
    """The LoRA settings that were given; targets with commas are names of modules, others a name or an expression."""
    parts: Any = targets
    if targets is not None and targets != "all-linear" and not set(targets) & set("*\\()[|"):
        parts = split_names(targets)
    given = {"rank": rank, "alpha": alpha, "targets": parts, "dropout": dropout}
    return {name: value for name, value in given.items() if value is not None}


def is_main() -> bool:
    """Whether this is the process that prints: the first of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def show(result: Any, as_json: bool) -> None:
    """Prints where the result is, and its figures."""
    if not is_main():
        return
    figures = {
        "path": str(result.path), "steps": result.steps, "first_loss": result.losses[0], "last_loss": result.losses[-1],
        "tokens_per_second": round(result.tokens_per_second, 1), "resumed_from": result.resumed_from,
        "dropped": result.dropped,
    }  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    sys.stdout.write(
        f"{result.path}\n  {result.steps} steps, loss {result.losses[0]:.3f} → {result.losses[-1]:.3f}, "
        f"{result.tokens_per_second:.0f} tokens/s\n  curve: training.json, rows: data.json\n"
    )
