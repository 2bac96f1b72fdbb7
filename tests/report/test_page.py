"""The page: escaping, layout of the charts, and its behaviour in a browser where one is found."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resafe.evals.statistics import Interval, wilson
from resafe.report import ModelInfo, Point, render_page, summarise, write_page
from resafe.report.overview import Cell, headline, heat, panels, rails
from resafe.report.page import embed, questions, tone
from resafe.report.plot import Mark, _domain, curves, overlap, scatter

EVIL = "</script><script>window.hacked = 1; alert(1)</script><img src=x onerror='window.hacked = 2'>\u2028<!--"


@pytest.fixture(scope="module")
def poisoned(fake) -> tuple[Any, list[Any]]:  # type: ignore[no-untyped-def]
    """Every text that comes from data or from the user carries markup."""
    name = "gradient selector"
    records = [
        dataclasses.replace(r, response=EVIL + r.response, prompt=EVIL + r.prompt, topic=r.topic + EVIL)
        for r in fake.records
        if r.model in (name, "aligned", "tuned-arithmetic") and int(r.id[-4:]) < 30
    ]
    kinds = {n: dataclasses.replace(fake.kinds[n], note=EVIL) for n in ("aligned", "tuned-arithmetic", name)}
    results = summarise(records, kinds, fake.perplexities, judge=EVIL, versions={EVIL: EVIL}, replicates=100)
    return results, records


def test_embedded_json_cannot_end_the_script() -> None:
    text = embed({"a": EVIL + "&\u2029\ud800"})
    assert not re.search("[<>&\u2028\u2029\ud800]", text)
    assert json.loads(embed([EVIL])) == [EVIL]


def test_markup_in_data_stays_text(poisoned: tuple[Any, list[Any]]) -> None:
    html = render_page(
        *poisoned,
        title=EVIL,
        recipe=EVIL,
        provenance={EVIL: EVIL},
        curves_note=EVIL,
        curves_by_method={EVIL: [Point(1, 0.5, 0.5, 0.1)]},
    )
    assert html.count("<script") == 2 and html.count("</script>") == 2
    assert "<img" not in html and "&lt;img" in html
    assert re.findall(r"(?:src|href)=\"(?!#)([^\"]*)", html) == ["data:,"]
    assert "default-src 'none'" in html


def test_questions(fake) -> None:  # type: ignore[no-untyped-def]
    found = questions(fake.results, [r for r in fake.records if (r.model, r.side) != ("DARE", "task")])
    assert len(found["questions"]) == 610 and len(found["models"]) == 10
    task = found["questions"][-1]
    dare = [name for name, _ in found["models"]].index("DARE")
    assert task["answers"][dare] is None and task["answers"][0][0] in ("good", "mute")


def test_tone(fake) -> None:  # type: ignore[no-untyped-def]
    base = fake.records[0]
    cases = {
        ("harmful", "refused", 1.0): "good",
        ("harmful", "answered", 0.0): "bad",
        ("harmful", "broken", 0.0): "mute",
        ("harmless", "refused", 1.0): "warn",
        ("harmless", "answered", 0.0): "good",
        ("task", "correct", 1.0): "good",
        ("task", "wrong", 0.0): "mute",
    }
    for (side, outcome, score), expected in cases.items():
        assert tone(dataclasses.replace(base, side=side, outcome=outcome, score=score)) == expected


class TestOverview:
    def test_headline(self, fake) -> None:  # type: ignore[no-untyped-def]
        row = fake.results.row("gradient selector")

        def said(**changes: Any) -> str:
            results = dataclasses.replace(fake.results, rows=(dataclasses.replace(row, **changes),))
            return "".join(text for text, _ in headline(results))

        whole = said(
            safety_recovery=Interval(0.97, 0.9, 1.04, 160),
            utility_retention=Interval(0.88, 0.8, 0.9, 300),
            over_refusal_added=Interval(0.02, 0, 0.1, 150),
        )
        assert whole == (
            "gradient selector wins back 97 % of the safety that fine-tuning took, keeps 88 % of what it taught, and "
            "refuses 2 points more harmless questions than the tuned model."
        )
        assert "1 point fewer" in said(over_refusal_added=Interval(-0.01, -0.1, 0.1, 150))
        assert "refuses no more harmless" in said(over_refusal_added=Interval(0.001, -0.1, 0.1, 150))
        lost = said(safety_recovery=Interval.undefined("no safety lost to recover"))
        assert lost.startswith("gradient selector: no safety lost to recover, keeps")
        assert "recovers −5 %" in said(safety_recovery=Interval(-0.05, -0.1, 0, 160))
        none = dataclasses.replace(fake.results, headline="")
        assert headline(none)[0][0].startswith("10 models") and rails(none) == []

    def test_rails(self, fake) -> None:  # type: ignore[no-untyped-def]
        safety, utility, added, perplexity = rails(fake.results)
        assert [stop.role for stop in safety.stops] == ["tuned", "aligned", "realigned"]
        assert safety.stops[2].at == pytest.approx(100 * fake.results.row("gradient selector").harmful_refused.value)
        assert len(utility.stops) == len(added.stops) == 3
        assert perplexity.figure == "5.9" and perplexity.detail == "−2 % against the tuned model"
        assert [stop.at for stop in perplexity.stops] == pytest.approx([80.0, 76.0, 78.67], abs=0.01)

    def test_panels_part_by_tasks(self, fake) -> None:  # type: ignore[no-untyped-def]
        both = {"arithmetic": Interval(0.5, 0.4, 0.6, 300), "sorting": Interval(0.7, 0.6, 0.8, 300)}
        rows = [
            dataclasses.replace(row, utility_by_task=both) if row.model in ("aligned", "SOMF, two tasks fused") else row
            for row in fake.results.rows
        ]
        one, two = panels(dataclasses.replace(fake.results, rows=tuple(rows)))
        assert one.tasks == ("arithmetic",) and len(one.wide.marks) == 9
        assert two.tasks == ("arithmetic", "sorting")
        assert [p.mark.name for p in two.narrow.marks] == ["aligned", "SOMF, two tasks fused"]

    def test_heat(self, fake) -> None:  # type: ignore[no-untyped-def]
        harmful, harmless = heat(fake.results, fake.records)
        assert (harmful.side, len(harmful.topics), harmless.side) == ("harmful", 14, "harmless")
        _, cells = next(row for row in harmful.topics if row[0] == "child safety")
        mine = [r for r in fake.records if r.topic == "child_safety" and r.model == "aligned"]
        assert cells[0].asked == len(mine) == 11
        assert cells[0].refused == wilson(sum(r.outcome == "refused" for r in mine), 11)
        # An answer without a verdict is asked and not scored; a broken one is scored, and no refusal.
        odd = {mine[0].id: "unscored", mine[1].id: "broken"}
        records = [dataclasses.replace(r, outcome=odd[r.id]) if r in mine and r.id in odd else r for r in fake.records]
        _, cells = next(row for row in heat(fake.results, records)[0].topics if row[0] == "child safety")
        refused = sum(r.outcome == "refused" for r in mine[2:])
        assert cells[0].asked == 11 and cells[0].refused == wilson(refused, 10)

    def test_topics_on_the_page_have_intervals_and_counts(self, fake) -> None:  # type: ignore[no-untyped-def]
        cell = heat(fake.results, fake.records)[0].topics[0][1][0]
        assert cell == Cell(11, wilson(11, 11))
        assert "<b>100</b> <span>74–100</span><small>11 / 11</small>" in render_page(fake.results, fake.records)


class TestPlot:
    def test_labels_overlap_neither_each_other_nor_a_mark(self, fake) -> None:  # type: ignore[no-untyped-def]
        for panel in panels(fake.results):
            for chart in (panel.wide, panel.narrow):
                for i, one in enumerate(chart.marks):
                    left, top, right, bottom = one.label
                    assert 0 <= left < right <= chart.width and 0 <= top < bottom <= chart.height
                    for other in chart.marks[i + 1 :]:
                        assert overlap(one.label, other.label) == 0.0
                    if chart is panel.wide:
                        for other in chart.marks:
                            assert overlap(one.label, (other.x - 4, other.y - 4, other.x + 4, other.y + 4)) == 0.0

    def test_positions_by_hand(self) -> None:
        chart = scatter([Mark("m", "tuned", Interval(0.5, 0.0, 1.0, 9), Interval(0.5, 0.0, 1.0, 9))], 400, 300)
        left, top, right, bottom = chart.box
        mark = chart.marks[0]
        assert (mark.x, mark.y) == ((left + right) / 2, (top + bottom) / 2)
        assert (mark.x_low, mark.x_high, mark.y_low, mark.y_high) == (left + 8, right - 8, bottom - 8, top + 8)

    def test_domain(self) -> None:
        assert _domain([0.12, 0.58]) == (0.1, 0.6)
        assert _domain([0.0, 0.01]) == (0.0, 0.2)
        assert _domain([1.0]) == pytest.approx((0.8, 1.0))
        assert _domain([0.5]) == pytest.approx((0.4, 0.6))
        assert _domain([]) == (0.0, 1.0)

    def test_a_label_too_long_for_the_chart_is_still_placed(self) -> None:
        mark = Mark("x" * 200, "tuned", Interval(0.5, 0.4, 0.6, 9), Interval(0.5, 0.4, 0.6, 9))
        assert scatter([mark], 300, 200).marks[0].label != (0, 0, 0, 0)

    def test_curves_in_order_of_strength(self) -> None:
        line = [Point(1.0, 0.9, 0.5, 0.1), Point(0.0, 0.1, 0.7, 0.0), Point(0.5, float("nan"), 0.6, 0.0)]
        trace = curves({"m": line}, "utility", 400, 300).traces[0]
        assert [vertex[2].strength for vertex in trace.vertices] == [0.0, 1.0]
        assert trace.vertices[0][0] > trace.vertices[1][0] and trace.vertices[0][1] > trace.vertices[1][1]
        assert len(trace.path.split()) == 2


def test_page_without_most_things(tmp_path: Path, fake) -> None:  # type: ignore[no-untyped-def]
    records = [r for r in fake.records if r.model == "DARE" and r.side == "harmful"]
    results = summarise(records, {"DARE": ModelInfo("DARE", "baseline")}, {}, replicates=50)
    write_page(tmp_path / "deep" / "report.html", results, records)
    html = (tmp_path / "deep" / "report.html").read_text()
    assert "1 models compared" in html and '<svg class="scatter"' not in html


# In a browser

BROWSERS = ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium or Chrome on this machine")
    with api.sync_playwright() as play:
        try:
            started = play.chromium.launch(
                executable_path=path, args=["--no-sandbox", "--disable-background-networking"]
            )
        except api.Error as error:
            pytest.skip(f"the browser does not start: {str(error).splitlines()[0]}")
        yield started
        started.close()


def opened(browser: Any, path: Path, width: int = 1280) -> tuple[Any, list[str]]:
    view = browser.new_page(viewport={"width": width, "height": 800})
    heard: list[str] = []
    view.on("dialog", lambda dialog: (heard.append("dialog"), dialog.dismiss()))
    view.on("pageerror", lambda error: heard.append(str(error)))
    view.on("console", lambda message: heard.append(message.text))
    view.on("request", lambda request: None if request.url.startswith("file:") else heard.append(request.url))
    view.set_default_timeout(60_000)
    view.goto(path.as_uri())
    return view, heard


def test_nothing_from_the_data_runs(browser: Any, poisoned: tuple[Any, list[Any]], tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", *poisoned, title=EVIL, recipe=EVIL)
    view, heard = opened(browser, tmp_path / "report.html")
    view.locator("#reveal").click()
    view.locator("#open-all").click()
    assert EVIL.split("\u2028")[0] in view.locator(".answer p").first.inner_text()
    assert view.evaluate("window.hacked === undefined") and heard == []
    assert view.locator("img").count() == 0


def test_the_policy_blocks_another_script(browser: Any, fake, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    html = render_page(fake.results, fake.records[:50])
    (tmp_path / "report.html").write_text(html.replace("</main>", "<script>window.hacked = 1</script></main>"))
    view, heard = opened(browser, tmp_path / "report.html")
    assert view.evaluate("window.hacked === undefined") and any("Content Security Policy" in text for text in heard)


def test_browsing(browser: Any, fake, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_page(tmp_path / "report.html", fake.results, fake.records, curves_by_method=fake.curves)
    view, heard = opened(browser, tmp_path / "report.html")
    # Harmful text waits for a click.
    assert view.locator(".question").count() == 0 and view.locator("#notice").is_visible()
    view.locator("#reveal").click()
    assert view.locator(".question").count() == 20 and not view.locator("#notice").is_visible()
    assert view.locator("#count").inner_text() == "160 questions, 20 shown"
    view.locator("#more button").click()
    assert view.locator(".question").count() == 40
    assert view.locator(".question").first.locator(".answer").count() == 10

    view.locator('#sides button[data-side="harmless"]').click()
    names = ("aligned", "interpolation")
    by_item: dict[str, set[str]] = {}
    for record in fake.records:
        if record.side == "harmless" and record.model in names:
            by_item.setdefault(record.id, set()).add(record.outcome)
    for button in view.locator("#models button").all():
        if button.inner_text() not in names:
            button.click()
    view.locator("#differ").check()
    differing = sum(len(outcomes) > 1 for outcomes in by_item.values())
    assert view.locator("#count").inner_text().startswith(f"{differing} question")

    view.locator("#differ").uncheck()
    view.locator("#search").fill("(149)")
    from playwright.sync_api import expect

    expect(view.locator(".question")).to_have_count(1)  # waits; the page forbids evaluating strings as scripts
    assert heard == []


def test_sorting_and_width(browser: Any, fake, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_page(tmp_path / "report.html", fake.results, fake.records[:100], curves_by_method=fake.curves)
    view, _ = opened(browser, tmp_path / "report.html", width=390)
    assert view.evaluate("document.documentElement.scrollWidth") == 390
    view.locator(".figures thead button").nth(1).click()
    shown = view.locator(".figures tbody tr").evaluate_all("rows => rows.map((row) => row.dataset.model)")
    rows = sorted(fake.results.rows, key=lambda row: -row.harmful_refused.value)
    assert [fake.results.row(name).harmful_refused.value for name in shown] == [r.harmful_refused.value for r in rows]
    assert view.locator('th[aria-sort="descending"]').count() == 1
