"""A table of shares as a picture: an SVG with a cell a layer and module, darker where less is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_CELL, _HEIGHT, _LEFT, _CHARACTER, _GAP = 46, 20, 56, 6.4, 8
_PALE, _DARK = (247, 248, 250), (158, 42, 43)


def heatmap(rows: Sequence[str], columns: Sequence[str], shares: Mapping[tuple[str, str], float], title: str) -> str:
    """An SVG picture of shares.

    Args:
        rows: Names of the rows, from the top.
        columns: Names of the columns.
        shares: (row, column) → share from 0 to 1; cells that are missing stay blank.
        title: Shown above, and read out by screen readers.
    """
    top = 34 + _CHARACTER * max(map(len, columns), default=0)
    width, height = _LEFT + _CELL * len(columns) + 12, top + _HEIGHT * len(rows) + 12
    low = min([*shares.values(), 0.999])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="system-ui, sans-serif" font-size="11" role="img" '
        f'aria-label="{escape(title)}"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="13" font-weight="600">{escape(title)}</text>',
    ]
    for place, column in enumerate(columns):
        x = _LEFT + _CELL * (place + 0.5) + 4
        parts.append(f'<text transform="translate({x:.0f} {top - _GAP:.0f}) rotate(-90)">{escape(column)}</text>')
    for line, row in enumerate(rows):
        y = top + _HEIGHT * line
        parts.append(f'<text x="{_LEFT - _GAP}" y="{y + 14:.0f}" text-anchor="end">{escape(row)}</text>')
        for place, column in enumerate(columns):
            if (row, column) not in shares:
                continue
            share = shares[row, column]
            removed = (1 - share) / (1 - low)
            colour = ",".join(f"{a + (b - a) * removed:.0f}" for a, b in zip(_PALE, _DARK, strict=True))
            x = _LEFT + _CELL * place
            parts.append(
                f'<rect x="{x}" y="{y:.0f}" width="{_CELL - 1}" height="{_HEIGHT - 1}" fill="rgb({colour})">'
                f"<title>{escape(row)} {escape(column)}: {share:.3f}</title></rect>"
                f'<text x="{x + _CELL / 2:.0f}" y="{y + 14:.0f}" text-anchor="middle" '
                f'fill="{"white" if removed > 0.55 else "#222"}">{share:.2f}</text>'
            )
    return "".join([*parts, "</svg>\n"])
