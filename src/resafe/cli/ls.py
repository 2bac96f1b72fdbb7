"""`resafe ls`: the methods that are registered, with their settings and sources."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from resafe.registry import Method


def ls(
    what: Annotated[str, typer.Argument(help="realign, fusion, data, judges or wrappers")] = "realign",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """List realign methods, fusion methods, data sets, judges or red-team wrappers, with settings and sources."""
    rows = _rows(what)
    if as_json:
        sys.stdout.write(json.dumps({"kind": what, "entries": rows}, ensure_ascii=False, default=str) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    headings = {column: column for column in rows[0]}
    if any(None in row.get("settings", {}).values() for row in rows):
        headings["settings"] = "settings (where no value stands: not used, or from the preset)"
    for column, heading in headings.items():
        table.add_column(heading, overflow="fold", style="bold" if column == "name" else "")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _rows(what: str) -> list[dict[str, Any]]:
    from resafe.errors import InputError
    from resafe.registry import nearest

    if what == "data":
        from resafe.data.registry import datasets

        return [
            {"name": s.name, "title": s.title, "kind": s.kind, "hub": s.hub or "", "licence": s.licence, "file": s.file}
            for s in datasets
        ]
    kinds = {"realign": _realign, "fusion": _fusion, "judges": _judges, "wrappers": _wrappers}
    if what not in kinds:
        raise InputError(f"nothing to list called '{what}'", nearest(what, [*kinds, "data"]))
    return [
        {
            "name": method.name,
            "title": method.title,
            "settings": {p.name: "needed" if p.default is ... else p.default for p in method.parameters},
            "source": method.source,
        }
        for method in kinds[what]()
    ]


def _realign() -> Iterable[Method]:
    from resafe.realign import REALIGN

    return REALIGN


def _fusion() -> Iterable[Method]:
    from resafe.fusion import FUSION

    return FUSION


def _judges() -> Iterable[Method]:
    from resafe.evals.judge import judges

    return judges()


def _wrappers() -> Iterable[Method]:
    from resafe.evals.wrappers import WRAPPERS

    return WRAPPERS


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(name if item is None else f"{name}={_text(item)}" for name, item in value.items()) or "–"
    return str(value)
