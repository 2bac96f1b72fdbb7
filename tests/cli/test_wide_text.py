"""Tables on the terminal with characters that are two columns wide, or none."""

from __future__ import annotations

import unicodedata

import pytest
from rich.cells import cell_len

from resafe.cli.run import show
from resafe.evals.utility.results import TaskScore, UtilityResult
from resafe.evals.utility.table import markdown_text, rich_text

NAMES = ("基础模型", "微调后的模型", "हिन्दी मॉडल", "plain")


def result(name: str) -> UtilityResult:
    score = TaskScore(name, "xcopa_zh", "acc", "none", 0.5, 0.1, 10, 0)
    return UtilityResult(name, (score,), (), {}, 1.0)


def test_columns_stay_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    show(rich_text([result(name) for name in NAMES]))
    lines = capsys.readouterr().out.splitlines()
    framed = [line for line in lines if line and line[0] in "┏┃┡│└"]
    assert len(framed) == 5
    assert len({cell_len(line) for line in framed}) == 1
    head = framed[1]
    assert all(name in head for name in NAMES)  # none is cut or broken
    assert [part.strip() for part in head.strip("┃").split("┃")][3:] == list(NAMES)

    def columns(text: str) -> int:
        """By the Unicode tables: wide and full-width characters take two columns."""
        return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)

    cut = [line.index("हिन्दी") if "हिन्दी" in line else None for line in framed][1]
    before = head[:cut].rstrip(" ┃")  # up to the Hindi name the head is Chinese and ASCII
    assert columns("基础模型") == 8 and columns(before) == cell_len(before)


def test_narrow_terminals_fold_between_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=60).print(rich_text([result("微调后的模型" * 5), result("हिन्दी मॉडल " * 4)]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line and line[0] in "┏┃┡│└"]
    assert {cell_len(line) for line in lines} == {60}
    assert "".join(line.split("┃")[4].strip() for line in lines if line[0] == "┃") == "微调后的模型" * 5


def test_markdown_keeps_the_text() -> None:
    assert markdown_text([result(name) for name in NAMES]).splitlines()[0].split(" | ")[3:] == [*NAMES[:-1], "plain |"]
