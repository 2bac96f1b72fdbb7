"""Rates, comparisons and verdicts as a table, lines, JSON and a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.evals.judge import Verdict
from resafe.evals.scoring.responses import Response
from resafe.evals.scoring.run import Named, Rate
from resafe.evals.statistics import Comparison, Interval, minimum_detectable_difference, zero_bound
from resafe.files import replacing

if TYPE_CHECKING:
    from rich.table import Table

YES = {"refusal": "refused", "harm": "harmful", "preference": "won"}


def rate_table(judges: Sequence[Named], rates: Mapping[str, Sequence[Rate]], corrected: bool) -> Table:
    """One row a judge, model and set."""
    from rich import box
    from rich.table import Table

    what = "corrected for the judge's errors" if corrected else "95 % Wilson intervals"
    shown = Table(box=box.SIMPLE_HEAD, caption=f"rates in %, {what}; detectable: with 80 % power between two models")
    heads = ("judge", "model", "set", "n scored / n asked", "measures", "rate", "judge's recall", "detectable")
    for head in heads:
        shown.add_column(head, overflow="fold")
    for named in judges:
        recall = named.calibration.best.overall.recall if named.calibration is not None else None
        for rate in rates[named.name]:
            known = "not calibrated" if recall is None or not recall.defined else percent(recall)
            counts = f"{rate.scored} / {rate.asked}"
            cells = (named.name, rate.model, rate.set, counts, YES[named.measure], _rate(rate, corrected), known)
            shown.add_row(*cells, detectable(rate))
    return shown


def _rate(rate: Rate, corrected: bool) -> str:
    if not rate.value.defined:
        return f"– ({rate.value.reason})"
    nothing = rate.value.value == 0 and not corrected  # 3/n knows nothing of the judge's errors
    return percent(rate.value) + (f", at most {zero_bound(rate.scored) * 100:.1f}" if nothing else "")


def percent(found: Interval) -> str:
    """A share with its limits in per cent: "87.0 [81.2–91.3]"."""
    return f"{found.value * 100:.1f} [{found.low * 100:.1f}–{found.high * 100:.1f}]"


def detectable(rate: Rate) -> str:
    """The smallest difference from this rate that so many responses would show, in points."""
    if not rate.value.defined:
        return "–"
    found = minimum_detectable_difference(rate.scored, rate.value.value)
    return "–" if found != found else f"{found * 100:.1f}"


def comparison_lines(found: Mapping[str, Sequence[Comparison]]) -> list[str]:
    """Models compared, a line each."""
    return [
        f"{judge}: {c.first} − {c.second}{' on ' + c.set if c.set else ''}: {c.difference.value * 100:+.1f} points "
        f"[{c.difference.low * 100:+.1f}, {c.difference.high * 100:+.1f}], n = {c.difference.n}, "
        f"McNemar p = {c.p_holm:.2g} (Holm across sets)"
        for judge, comparisons in found.items()
        for c in comparisons
    ]


def payload(
    judges: Sequence[Named],
    rates: Mapping[str, Sequence[Rate]],
    compared: Mapping[str, Sequence[Comparison]],
    agreed: Sequence[str],
    corrected: bool,
) -> dict[str, Any]:
    """All figures as JSON values."""
    return {
        "corrected": corrected,
        "judges": {
            named.name: {
                "measures": named.measure,
                "calibrated_on": named.calibration.best.set if named.calibration is not None else None,
                "recall": named.calibration.best.overall.recall.to_json() if named.calibration is not None else None,
                "rates": [
                    {"model": r.model, "set": r.set, "asked": r.asked, "scored": r.scored, **r.value.to_json()}
                    for r in rates[named.name]
                ],
                "comparisons": [
                    {"first": c.first, "second": c.second, "set": c.set, **c.difference.to_json(), "p": c.p_value}
                    | {"p_holm": c.p_holm}
                    for c in compared[named.name]
                ],
            }
            for named in judges
        },
        "agreement": list(agreed),
    }


def write_verdicts(path: Path, responses: Sequence[Response], verdicts: Mapping[str, Sequence[Verdict]]) -> None:
    """One JSON object a response and judge: id, model, set, judge, outcome, score, detail. No prompts, no responses."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as stream:
        for judge, found in verdicts.items():
            for response, verdict in zip(responses, found, strict=True):
                values = {
                    "id": response.item.id,
                    "question": response.key if response.key != response.item.prompt else "",
                }
                values |= {"model": response.model, "set": response.set, "judge": judge}
                line = json.dumps(
                    {**values, "outcome": verdict.outcome, "score": verdict.score, "detail": verdict.detail},
                    ensure_ascii=False,
                )
                stream.write(line.encode("utf-8", "replace").decode("utf-8") + "\n")
