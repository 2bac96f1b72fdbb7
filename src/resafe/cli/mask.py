"""`resafe mask`: trains masks, applies them, shows what they keep."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from resafe.masks import Mask

app = typer.Typer(
    help="Safety masks as files: train, apply, look at them, use them on other tasks.", no_args_is_help=True
)

MaskDirectory = Annotated[Path, typer.Argument(help="directory of the mask")]
Aligned = Annotated[str, typer.Option(help="the aligned checkpoint: path, org/name, base+adapter, file.gguf")]
Tuned = Annotated[
    list[str], typer.Option(help="a tuned checkpoint; several are fused, in the order in which the mask was learnt")
]
Out = Annotated[Path, typer.Option(help="directory to write")]
Strength = Annotated[float | None, typer.Option(help="how much of what it removes is removed; 1 is the mask itself")]
Fusion = Annotated[
    str | None, typer.Option(help="how several tuned models are combined; default: as when the mask was learnt")
]
Space = Annotated[str, typer.Option(help="auto, factors or weights (for adapters)")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="also read *.bin, as plain tensors")]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="e.g. recipes/mask.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="fields to set: settings.steps=40")] = None,
    out: Annotated[Path | None, typer.Option(help="directory to write; default: as the file says")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Learn a mask over the task vectors of tuned models. A killed training goes on where it stopped.

    With several processes: torchrun --nproc-per-node 2 -m resafe mask train mask.yaml
    """
    from resafe.cli.console import ConsoleReporter
    from resafe.errors import InputError
    from resafe.recipe import load_mask

    loaded = load_mask(recipe, overrides or [])
    place = out or loaded.out
    if place is None:
        raise InputError(f"{recipe}: no output directory is named", "add a field out, or give --out DIRECTORY")
    from resafe.api import train_mask
    from resafe.cli.training import is_main

    fields: dict[str, Any] = loaded.model_dump(exclude={"out", "fusion"})
    written = train_mask(
        **fields, out=place, fusion=loaded.fusion.name, fusion_settings=loaded.fusion.settings,
        progress=ConsoleReporter(quiet=quiet).bar("mask", "steps"),
    )  # fmt: skip
    if is_main():
        typer.echo(str(written))
    from resafe.masks.processes import leave

    leave()


@app.command()
def apply(
    mask: MaskDirectory, aligned: Aligned, tuned: Tuned, out: Out, strength: Strength = None,
    fusion: Fusion = None, space: Space = "auto", allow_pickle: AllowPickle = False,
) -> None:  # fmt: skip
    """Apply a mask to the models it was learnt on: aligned + tuned + mask → a realigned model or adapter."""
    _apply(mask, aligned, tuned, out, strength, fusion, space, allow_pickle, transfer=False)


@app.command()
def transfer(
    mask: MaskDirectory, aligned: Aligned, tuned: Tuned, out: Out, strength: Strength = None,
    fusion: Fusion = None, space: Space = "auto", allow_pickle: AllowPickle = False,
) -> None:  # fmt: skip
    """Apply a mask to models that were tuned from the same aligned model on other tasks. Evaluate what comes out."""
    _apply(mask, aligned, tuned, out, strength, fusion, space, allow_pickle, transfer=True)


def _apply(
    mask: Path, aligned: str, tuned: list[str], out: Path, strength: float | None, fusion: str | None, space: str,
    allow_pickle: bool, *, transfer: bool,
) -> None:  # fmt: skip
    from resafe.api import apply_mask

    written = apply_mask(
        mask, aligned, tuned, out=out, strength=strength, transfer=transfer, fusion=fusion, space=space,
        allow_pickle=allow_pickle,
    )  # fmt: skip
    typer.echo(str(written))


@app.command()
def average(
    masks: Annotated[list[Path], typer.Argument(help="two or more mask directories")],
    out: Out,
    weight: Annotated[list[float] | None, typer.Option(help="one a mask, in their order; default: all alike")] = None,
) -> None:
    """Write the mean of masks over the same task vectors: of other seeds, objectives or data."""
    from resafe.api import average_masks

    typer.echo(str(average_masks(masks, out=out, weights=weight)))


@app.command()
def info(
    mask: MaskDirectory,
    picture: Annotated[Path | None, typer.Option(help="also draw the table into this .svg")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Show what a mask keeps in each layer and module, and where it comes from."""
    from resafe.errors import InputError
    from resafe.masks.format import load_masks

    if picture is not None and (picture.suffix != ".svg" or not picture.parent.is_dir()):
        raise InputError(f"--picture {picture}: cannot be written", "name an .svg file in a directory that is there")
    masks = load_masks(mask)  # several where every tuned model has its own
    found = []
    for number, read in enumerate(masks):
        title = str(mask) if len(masks) == 1 else f"{mask}/{number}"
        place = picture
        if picture is not None and len(masks) > 1:
            place = picture.with_name(f"{picture.stem}-{number}{picture.suffix}")
        found.append(_shown(read, title, place, quiet=as_json))
    if as_json:
        sys.stdout.write(json.dumps(found[0] if len(found) == 1 else {"masks": found}) + "\n")


def _shown(read: Mask, title: str, picture: Path | None, *, quiet: bool) -> dict[str, Any]:
    """Prints a mask's table and writes its picture; returns the facts."""
    from resafe.masks.summary import keep_rates, mean_keep

    rates = keep_rates(read)
    facts = {
        "granularity": read.settings.granularity, "rescale": read.settings.rescale, "binary": read.binary,
        "keep_rate": read.keep_rate, "values": sum(rate.values for rate in rates),
        "aligned": read.provenance.get("aligned"), "tuned": read.provenance.get("tuned"),
        "fusion": read.provenance.get("fusion"),
    }  # fmt: skip
    modules = list(dict.fromkeys(rate.module for rate in sorted(rates, key=lambda r: (r.layer is None, r.module))))
    layers = list(dict.fromkeys(rate.layer for rate in rates))
    cells = {(_name(rate.layer), rate.module): rate.keep for rate in rates}
    if picture is not None:
        from resafe.report.heatmap import heatmap

        drawn = heatmap(
            [_name(layer) for layer in layers], modules, cells, f"Share kept by {title}: {read.keep_rate:.3f}"
        )
        picture.write_text(drawn, encoding="utf-8")
    if not quiet:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, title=f"{title}: share kept, by layer and module", title_justify="left")
        table.add_column("layer", style="bold")
        outside = [rate for rate in rates if rate.layer is None]
        inside = [module for module in modules if any(r.module == module and r.layer is not None for r in rates)]
        for module in inside:
            table.add_column(module.replace(".", "\n"), justify="right")
        table.add_column("all", justify="right", style="bold")
        for layer in (layer for layer in layers if layer is not None):
            of = [rate for rate in rates if rate.layer == layer]
            row = [cells.get((_name(layer), module)) for module in inside]
            table.add_row(_name(layer), *("" if s is None else f"{s:.2f}" for s in row), f"{mean_keep(of):.2f}")
        console = Console(width=None if sys.stdout.isatty() else 220, highlight=False)
        if inside:
            console.print(table)
        if outside:
            listed = ", ".join(f"{rate.module} {rate.keep:.2f}" for rate in outside)
            console.print(f"{'outside the layers' if inside else title}: {listed}", soft_wrap=True)
        console.print(
            f"{facts['values']:,} {facts['granularity']} values, {'binary' if read.binary else 'soft'}, "
            f"{read.keep_rate:.3f} kept; rescale: {facts['rescale']}"
        )
        if len(read.provenance.get("tuned") or []) > 1 and (fusion := read.provenance.get("fusion")):
            console.print(f"learnt with the fusion {fusion['name']} {fusion['settings']}", markup=False)
    shares = [asdict(rate) for rate in rates]
    return {**facts, "rates": shares}


def _name(layer: int | None) -> str:
    return "–" if layer is None else str(layer)
