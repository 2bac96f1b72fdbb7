"""`resafe fuse`: combines tuned models; and what `resafe plan` says of it."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from resafe.engine import Request
    from resafe.engine.estimate import Estimate


class Where(StrEnum):
    """Where the work is done: the engine's executors, named here too so that help does not wait for torch."""

    serial = "serial"
    threads = "threads"
    ray = "ray"


def fuse(
    recipe: Annotated[Path, typer.Argument(help="a fusion file, e.g. recipes/fuse.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="fields to set: method=ties settings.keep=0.3")] = None,
    out: Annotated[
        str | None, typer.Option(help="directory or s3://bucket/prefix to write; default: as the file says")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="worker threads; default: one a core", min=1)] = None,
    rank: Annotated[int, typer.Option(help="this process's share of the files, from 0", min=0)] = 0,
    world: Annotated[int, typer.Option(help="processes that share the work and the directory", min=1)] = 1,
    executor: Annotated[Where, typer.Option(help="where the work is done; ray: a task a file")] = Where.threads,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster; default: the one here, or a new one")] = None,
    memory: Annotated[str | None, typer.Option(help="most that buffers may take, e.g. 1GB")] = None,
    device: Annotated[str | None, typer.Option(help="where methods compute: cpu, cuda, auto")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Fuse tuned models onto their base, on disks or in object storage.

    An interrupted fusion goes on; the output appears whole or not at all.
    """
    from resafe.cli.console import ConsoleReporter

    given = {"memory": memory, "device": device}
    changes = [*(overrides or []), *(f"{name}={value}" for name, value in given.items() if value)]
    request = request_of(recipe, changes, out)
    reporter = ConsoleReporter(quiet=quiet)
    from resafe.api import run_fusion

    bars: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        bar = bars.setdefault(what, reporter.bar(what, "MB"))
        bar(done // 10**6, max(1, total // 10**6), {})

    outcome = run_fusion(
        request, threads=threads, rank=rank, world=world, progress=progress, note=reporter.say,
        executor=executor.value, ray_address=ray_address,
    )  # fmt: skip
    bad = {r.file: {**r.nan, **r.inf} for r in outcome.receipts if r.nan or r.inf}
    if as_json:
        found = {
            "out": str(outcome.out), "committed": outcome.committed, "redone": outcome.redone,
            "seconds": round(outcome.seconds, 2), "files": {r.file: r.sha256 for r in outcome.receipts},
            "not_finite": bad,
        }  # fmt: skip
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for file, tensors in bad.items():
        reporter.say(f"warning: {file} holds NaN or infinite values in {', '.join(sorted(tensors))}")
    if outcome.committed:
        typer.echo(f"{outcome.out}  ({outcome.seconds:.1f} s)")
    else:
        typer.echo(f"rank {rank} is done; {outcome.out} appears when the others are")


def request_of(recipe: Path, overrides: list[str], out: str | None) -> Request:
    """The request that a fusion file makes."""
    from resafe.errors import InputError
    from resafe.recipe import load_fuse

    loaded = load_fuse(recipe, overrides)
    place = out or loaded.out
    if place is None:
        raise InputError(
            f"{recipe}: no output directory is named",
            "add a field out, or give --out DIRECTORY (or s3://BUCKET/PREFIX)",
        )
    from resafe.checkpoints import parse_output
    from resafe.engine import Input, Request

    models = tuple(Input(model.reference, model.name, model.weight) for model in loaded.models)
    fields = loaded.model_dump(exclude={"models", "out"})
    return Request(models=models, out=parse_output(place), **fields)


def show_plan(recipe: Path, overrides: list[str], as_json: bool) -> None:
    """Prints what a fusion would do; every problem is found at once."""
    from resafe.checkpoints import show_size
    from resafe.engine import build_plan
    from resafe.engine.estimate import estimate
    from resafe.engine.pool import usable_cores

    plan = build_plan(request_of(recipe, overrides, "unnamed"))
    cost = estimate(plan, usable_cores())
    tensors = [tensor for unit in plan.units for tensor in unit.tensors]
    fused = [tensor for tensor in tensors if tensor.fused]
    facts: dict[str, object] = {
        "method": plan.fusion.name,
        "settings": plan.fusion.resolved(),
        "tensors": len(tensors),
        "fused": len(fused),
        "unchanged": len(tensors) - len(fused),
        "files": len(plan.units),
        "passes": plan.passes,
        "bytes_read": cost.bytes_read,
        "bytes_written": cost.bytes_written,
        "memory": cost.memory,
        "seconds": None if cost.seconds is None else round(cost.seconds, 1),
        "notes": list(plan.notes),
    }
    if as_json:
        sys.stdout.write(json.dumps(facts, default=str) + "\n")
        return
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    lines = [
        f"base      {plan.base.reference}",
        *(f"model     {model.name}  ({model.checkpoint.kind})" for model in plan.models),
        f"method    {plan.method.title}  {plan.fusion.resolved()}",
        f"tensors   {len(tensors)} matched by name, {len(fused)} fused, {len(tensors) - len(fused)} unchanged"
        f"  ({', '.join(kinds)})",
        f"files     {len(plan.units)}, {show_size(cost.bytes_written)}",
        f"reading   {show_size(cost.bytes_read)} in {plan.passes} {'pass' if plan.passes == 1 else 'passes'}",
        f"memory    {show_size(cost.memory)} of buffers",
        f"time      {_time(cost)}",
        *(f"note      {note}" for note in plan.notes),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _time(cost: Estimate) -> str:
    from resafe.checkpoints import show_size

    if cost.seconds is None or cost.read_rate is None:
        return "not estimated: it depends on the way to the object storage"
    return f"about {cost.seconds:.1f} s here  (reading at {show_size(cost.read_rate)}/s)"
