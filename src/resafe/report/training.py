"""Loss curves of trainings, in pixels: a line each, thinned by averaging over neighbouring steps. Knows no SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resafe.report.plot import Box

POINTS = 100
"""Most vertices of a line; more steps are averaged in groups of equal size."""


@dataclass(frozen=True)
class Line:
    """A curve in pixels; `path` is the `points` of an SVG polyline, `first` and `last` its ends as losses."""

    name: str
    colour: int
    path: str
    steps: int
    first: float
    last: float


@dataclass(frozen=True)
class LossChart:
    """A chart in pixels."""

    width: float
    height: float
    box: Box
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]


def thinned(losses: Sequence[float], points: int = POINTS) -> list[tuple[float, float]]:
    """(middle step, mean loss) of groups of steps, at most `points`; losses that are not finite left out."""
    size = max(1, math.ceil(len(losses) / points))
    found = []
    for start in range(0, len(losses), size):
        group = [loss for loss in losses[start : start + size] if math.isfinite(loss)]
        if group:
            found.append((start + (min(size, len(losses) - start) + 1) / 2, sum(group) / len(group)))
    return found


def loss_chart(losses: Mapping[str, Sequence[float]], width: float, height: float) -> LossChart:
    """Lay out the losses of trainings over their steps, from zero.

    Args:
        losses: Training → the loss of each step.
        width: Width in pixels.
        height: Height in pixels.
    """
    curves = {name: points for name, line in losses.items() if (points := thinned(line))}
    left, top, right, bottom = box = (44.0, 30.0, width - 12.0, height - 48.0)
    most = max((y for points in curves.values() for _, y in points), default=1.0)
    steps = max((len(line) for line in losses.values()), default=1)
    y_step, x_step = _step(most, 5), max(1.0, _step(steps, 5))

    def x(value: float) -> float:
        return left + (right - left) * value / max(1, steps)

    def y(value: float) -> float:
        return bottom - (bottom - top - 6) * value / (most or 1.0)

    lines = tuple(
        Line(name, place % 8, " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points), len(losses[name]), points[0][1],
             points[-1][1])
        for place, (name, points) in enumerate(curves.items())
    )  # fmt: skip
    x_ticks = tuple((x(i * x_step), f"{i * x_step:g}") for i in range(int(steps / x_step) + 1))
    y_ticks = tuple((y(i * y_step), f"{i * y_step:g}") for i in range(int(most / y_step + 1e-9) + 1))
    return LossChart(width, height, box, x_ticks, y_ticks, lines)


def _step(top: float, most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides `top` into at most `most` parts."""
    if top <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(top / most))
    return next(factor * power for factor in (1, 2, 5, 10) if top / (factor * power) <= most + 1e-9)
