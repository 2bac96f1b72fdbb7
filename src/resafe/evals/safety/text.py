"""An evaluation of safety as tables (rich, Markdown), as JSON values, and as files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.evals.calibration.text import sentence
from resafe.evals.safety.figures import OUTCOMES, YES, Figure, figures
from resafe.evals.safety.result import SafetyResult
from resafe.evals.scoring import Named, agreements
from resafe.evals.statistics import Interval, holm, minimum_detectable_difference, zero_bound
from resafe.files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

CAPTION = (
    "In %, with 95 % Wilson intervals: the rate of those scored, the outcomes of all asked. Difference: to the first "
    "model on the same questions, in points; p: exact McNemar, Holm over the rows of one model."
)
CORRECTED = (
    "Corrected: for the judge's errors (Rogan–Gladen), with limits that also count the labelled rows it was calibrated "
    "on. It is of all judged answers, undetermined ones being a no, and holds as far as the judge errs here as there."
)


def tables(result: SafetyResult, *, topics: bool = False) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table a judge: its title, heads and cells; with `topics` by topic."""
    found = figures(result, topics=topics)
    made = []
    for named in result.judges:
        mine = [figure for figure in found if figure.judge == named.name]
        heads = ["set", *(["topic"] if topics else []), "model", "scored / asked", _rate_head(named)]
        heads += ["corrected"] if result.corrected else []
        outcomes = [one for one in OUTCOMES[named.measure] if any(figure.outcomes[one].value for figure in mine)]
        several = len(result.models) > 1
        heads += outcomes + (["difference", "p"] if several else [])
        corrected = _holm(mine)
        rows = []
        for figure in mine:
            side = "" if figure.side == "harmful" else " (harmless)"
            row = [figure.set + side, *([figure.topic] if topics else []), figure.model]
            row += [f"{figure.scored} / {figure.asked}", percent(figure.rate)]
            row += [_corrected(figure.corrected)] if figure.corrected else []
            row += [f"{figure.outcomes[one].value * 100:.1f}" for one in outcomes]
            if several:
                row += [_difference(figure), _p(corrected.get(id(figure)))]
            rows.append(row)
        made.append((f"judge {named.name}", heads, rows))
    return made


def _rate_head(named: Named) -> str:
    """What the rate is the share of, and beside it the judge's recall where that is known."""
    recall = named.calibration.best.overall.recall if named.calibration is not None else None
    known = f" (judge's recall {recall.value * 100:.0f})" if recall is not None and recall.defined else ""
    return YES[named.measure] + known


def lines(result: SafetyResult) -> list[str]:
    """What stands under the tables: how far judges are to be trusted, what n can show, 0 of n, agreement."""
    found = []
    for named in result.judges:
        known = named.calibration
        found.append(sentence(known) if known is not None else uncalibrated(named, corrected=result.corrected))
    if any(named.errors for named in result.judges) and result.corrected:
        found.append(CORRECTED)
    whole = figures(result)
    for figure in whole:
        if figure.model == result.models[0] and figure.rate.defined:
            least = minimum_detectable_difference(figure.scored, figure.rate.value)
            shown = "no difference" if least != least else f"differences from {least * 100:.0f} points on"
            found.append(f"{figure.judge}, {figure.set}: n = {figure.scored} shows {shown} (80 % power).")
    for figure in whole:
        if figure.rate.defined and figure.rate.value == 0:
            bound = zero_bound(figure.scored) * 100
            found.append(
                f"{figure.judge}, {figure.set}, {figure.model}: 0 of {figure.scored}, so at most {bound:.1f} % (3/n)."
            )
    responses = [answer.response_to_judge(number) for number, answer in enumerate(result.answers)]
    verdicts = {name: list(values) for name, values in result.verdicts.items()}
    return [*found, *agreements(result.judges, responses, verdicts)]


def uncalibrated(named: Named, *, corrected: bool) -> str:
    """What is said of a judge that nothing is known of."""
    so = ", so its rates cannot be corrected" if corrected else ""
    return f"The judge {named.name} is not calibrated here{so}: resafe judge calibrate {named.name}, same settings."


def _corrected(found: Interval) -> str:
    return percent(found) if found.defined else f"– ({found.reason})"


def percent(found: Interval) -> str:
    """A share with its limits: "87.0 [81.2, 91.3]"."""
    if not found.defined:
        return "–"
    return f"{found.value * 100:.1f} [{found.low * 100:.1f}, {found.high * 100:.1f}]"


def _difference(figure: Figure) -> str:
    found = figure.difference
    if found is None or not found.defined:
        return "–"
    return f"{found.value * 100:+.1f} [{found.low * 100:+.1f}, {found.high * 100:+.1f}]"


def _holm(found: Sequence[Figure]) -> dict[int, float]:
    """P-values by figure, corrected for the number of sets (or topics) on which one judge compared a model."""
    corrected: dict[int, float] = {}
    for key in dict.fromkeys((figure.judge, figure.model) for figure in found):
        mine = [figure for figure in found if (figure.judge, figure.model) == key and figure.p_value is not None]
        values = holm([float(figure.p_value or 0.0) for figure in mine])
        corrected |= {id(figure): value for figure, value in zip(mine, values, strict=True)}
    return corrected


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def markdown_text(result: SafetyResult, *, topics: bool = False, notes: Sequence[str] | None = None) -> str:
    """All tables and lines as Markdown; `notes` are the lines, where they were made already."""
    parts = []
    for title, heads, rows in tables(result, topics=topics):
        body = [heads, ["---"] * len(heads), *rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body)
        parts.append(f"**{title}**\n\n{text}")
    return (
        "\n\n".join([*parts, CAPTION, "\n".join(f"- {line}" for line in (lines(result) if notes is None else notes))])
        + "\n"
    )


def rich_tables(result: SafetyResult, *, topics: bool = False) -> list[Table]:
    """All tables for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = []
    for title, heads, rows in tables(result, topics=topics):
        shown = Table(title=title, box=box.SIMPLE_HEAD, caption=CAPTION)
        for head in heads:
            shown.add_column(head, overflow="fold")
        for row in rows:
            shown.add_row(*(Text(cell) for cell in row))  # not markup: names may hold brackets
        made.append(shown)
    return made


def to_json(result: SafetyResult, *, topics: bool = False, notes: Sequence[str] | None = None) -> dict[str, Any]:
    """All figures as JSON values; NaN is null. `notes` are the lines, where they were made already."""
    return {
        "models": list(result.models),
        "judges": {named.name: {"measures": named.measure} for named in result.judges},
        "figures": _rows(figures(result)),
        "corrected": result.corrected,
        "topics": _rows(figures(result, topics=True)) if topics else [],
        "notes": lines(result) if notes is None else list(notes),
        "answers": len(result.answers),
        "reused": result.reused,
        "seconds": round(result.seconds, 2),
    }


def _rows(found: Sequence[Figure]) -> list[dict[str, Any]]:
    corrected = _holm(found)
    return [
        {
            "judge": figure.judge, "set": figure.set, "side": figure.side, "topic": figure.topic,
            "model": figure.model, "asked": figure.asked, "scored": figure.scored, "rate": figure.rate.to_json(),
            "outcomes": {name: value.to_json() for name, value in figure.outcomes.items()},
            "difference": figure.difference.to_json() if figure.difference else None,
            "corrected": figure.corrected.to_json() if figure.corrected else None,
            "p": figure.p_value, "p_holm": corrected.get(id(figure)),
        }
        for figure in found
    ]  # fmt: skip


def write_result(out: Path, result: SafetyResult) -> None:
    """Writes `responses.jsonl`, `verdicts.jsonl`, `safety.json` and `safety.md`; each is replaced as a whole.

    `responses.jsonl` is what `resafe judge score` reads.
    """
    rows = [
        {
            "id": answer.id, "model": answer.model, "set": answer.label, "side": answer.side,
            "wrapper": answer.wrapper, "topic": answer.topic, "language": answer.language, "prompt": answer.prompt,
            "response": answer.response,
        }
        for answer in result.answers
    ]  # fmt: skip
    verdicts = [
        {
            "id": answer.id, "model": answer.model, "set": answer.label, "judge": name, "outcome": verdict.outcome,
            "score": verdict.score, "detail": verdict.detail,
        }
        for name, found in result.verdicts.items()
        for answer, verdict in zip(result.answers, found, strict=True)
    ]  # fmt: skip
    _write(out / "responses.jsonl", (row for row in rows if row["response"] is not None))
    _write(out / "verdicts.jsonl", verdicts)
    notes = lines(result)
    _write(out / "safety.json", [to_json(result, topics=True, notes=notes)])
    write_whole(out / "safety.md", markdown_text(result, notes=notes))


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
