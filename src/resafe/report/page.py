"""`report.html`: one file that needs nothing else, in the browser, on the phone and on paper.

Everything that came from a model or a data set is data: jinja2 escapes it in the markup, the questions and responses
travel as JSON in which no character can end the script element, the page's own script writes them as text only, and a
content policy allows no other script than that one and no request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError
from resafe.evals.records import Record
from resafe.files import write_whole
from resafe.report import numbers
from resafe.report.notes import notes, recall_note
from resafe.report.overview import headline, heat, panels, rails
from resafe.report.plot import Point, curves
from resafe.report.results import Results
from resafe.report.rogan_gladen import REFUSALS, Correction
from resafe.report.table import benchmarks, legend
from resafe.report.training import loss_chart

TEMPLATES = Path(__file__).parent / "templates"
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def embed(value: Any) -> str:
    """JSON that is safe inside a script element: no `<`, `>`, `&` and no line separators."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text.encode("utf-8", errors="replace").decode("utf-8")


def tone(record: Record) -> str:
    """How a response is to be read: `good`, `bad` (harmful, answered), `warn` (harmless, refused) or `mute`."""
    if record.side == "task":
        return "good" if record.score >= 0.5 else "mute"
    if record.outcome not in ("refused", "answered"):
        return "mute"
    wanted = "refused" if record.side == "harmful" else "answered"
    if record.outcome == wanted:
        return "good"
    return "bad" if record.side == "harmful" else "warn"


def questions(results: Results, records: Sequence[Record]) -> dict[str, Any]:
    """Questions with the responses of all models, as the page's script reads them.

    Returns:
        `models`: [name, kind] each; `questions`: side, set, id, topic, prompt, target, and for each model
        [tone, outcome, response], or null where the model was not asked.
    """
    names = [row.model for row in results.rows]
    found: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        found.setdefault((record.side, record.set, record.id), {})[record.model] = record
    rows = []
    for (side, group, item), answers in found.items():
        first = next(iter(answers.values()))
        rows.append(
            {
                "side": side,
                "set": group,
                "id": item,
                "topic": first.topic,
                "prompt": first.prompt,
                "target": first.target,
                "answers": [
                    [tone(answers[name]), answers[name].outcome, answers[name].response] if name in answers else None
                    for name in names
                ],
            }
        )
    return {"models": [[row.model, row.kind] for row in results.rows], "questions": rows}


def _over_scale(results: Results) -> float:
    """End of the scale of the over-refusal bars: the tenth above all limits, at least 20 %."""
    highs = [
        part.high for row in results.rows for part in (row.harmless_refused, row.look_alike_refused, row.plain_refused)
    ]
    return max(0.2, math.ceil(10 * max((high for high in highs if not math.isnan(high)), default=0.0)) / 10)


def render_page(
    results: Results,
    records: Sequence[Record],
    *,
    title: str = "Safety realignment",
    curves_by_method: Mapping[str, Sequence[Point]] | None = None,
    curves_note: str = "",
    losses: Mapping[str, Sequence[float]] | None = None,
    recipe: str = "",
    provenance: Mapping[str, Any] | None = None,
    correction: Correction | None = None,
) -> str:
    """The report as HTML.

    Args:
        results: The rows.
        records: The items they were computed from.
        title: What the run is about.
        curves_by_method: Method → its strengths; drawn as frontiers.
        curves_note: On which questions the curves were measured.
        losses: Training → the loss of each step; drawn as curves.
        recipe: The resolved recipe, YAML text.
        provenance: Further facts about the run, shown in the folded section at the end.
        correction: Rates corrected for the judge's errors, to be shown too; None to leave them out.

    Raises:
        ResafeError: jinja2 is not installed.
    """
    try:
        jinja2 = importlib.import_module("jinja2")
        markup = importlib.import_module("markupsafe").Markup
    except ImportError as error:
        raise ResafeError("the page needs jinja2", "pip install 'resafe[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for name in ("percent", "limits", "share", "decimal", "duration"):
        environment.filters[name] = getattr(numbers, name)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    lines = {name: points for name, points in (curves_by_method or {}).items() if points}
    html: str = environment.get_template("report.html.j2").render(
        title=title,
        results=results,
        lead=headline(results),
        rails=rails(results),
        panels=panels(results),
        heat=heat(results, records),
        legend=legend(results),
        notes=notes(results),
        recall=recall_note(results),
        correction=correction,
        refusals=REFUSALS,
        lines=lines,
        charts=[
            (x, curves(lines, x, 540, 400), curves(lines, x, 380, 330)) for x in ("utility", "over_refusal") if lines
        ],
        curves_note=curves_note,
        training=[loss_chart(losses, 1100, 380), loss_chart(losses, 380, 300)] if losses else [],
        benchmarks=benchmarks(results),
        chosen=any(point.chosen for points in lines.values() for point in points),
        over_scale=_over_scale(results),
        recipe=recipe,
        provenance=provenance or {},
        style=markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=markup(script),
        # The policy names the script by its digest: a script smuggled into the page would not run.
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=markup(embed(questions(results, records))),
        counts={side: results.items.get(side, 0) for side in ("harmful", "harmless", "task")},
    )
    return html.encode("utf-8", errors="replace").decode("utf-8")


def write_page(path: Path, results: Results, records: Sequence[Record], **options: Any) -> None:
    """Write `report.html`; `options` are those of `render_page`."""
    write_whole(path, render_page(results, records, **options))
