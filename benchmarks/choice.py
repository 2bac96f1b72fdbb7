"""What the rule for strengths would choose with other prices of over-refusal: for docs/results/realign.md.

    python benchmarks/choice.py

Of the test answers of every kept row and seed (benchmarks/realign/), as many items as the grid has validation items
are drawn without replacement, a strength is chosen on them, and measured on the rest; 400 draws each. No model is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from realign_rows import ENDS, KEPT, Row, load

from resafe.recipe.select import ChoiceRule, Measured, choose, judge

PRICES = (10.0, 5.0, 3.0, 2.0)
METHODS = {"somf": "SOMF", "sft": "Further SFT", "selector": "Gradient selector", "interpolation": "Interpolation"}
DRAWS = 400


def drawn(row: Row, method: str, sizes: Mapping[str, int], seed: int) -> list[tuple[dict[float, Any], dict[str, Any]]]:
    """Of every draw: strength → figures on the drawn items (with those of both ends), and all figures on the rest."""
    generator, found = np.random.default_rng(seed), []
    names = (*ENDS, *row.members(method))
    for _ in range(DRAWS):
        parts: list[dict[str, Measured]] = [{}, {}]
        orders = {side: generator.permutation(len(row.scores[ENDS[0]][side])) for side in sizes}
        for name in names:
            means = [
                [row.scores[name][side][part].mean() for side, part in split.items()]
                for split in (
                    {side: order[: sizes[side]] for side, order in orders.items()},
                    {side: order[sizes[side] :] for side, order in orders.items()},
                )
            ]
            for part, (harmful, harmless, task) in zip(parts, means, strict=True):
                part[name] = Measured(float(harmful), float(harmless), float(task))
        strengths = {float(name.split("@")[1]): name for name in names[2:]}
        asked, rest = parts
        found.append(
            (
                {s: judge(s, asked[name], asked[ENDS[0]], asked[ENDS[1]]) for s, name in strengths.items()},
                {s: judge(s, rest[name], rest[ENDS[0]], rest[ENDS[1]]) for s, name in strengths.items()},
            )
        )
    return found


def main() -> None:
    """Prints a line a method and price."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side, size in (("harmful", 80), ("harmless", 120), ("task", 60)):
        parser.add_argument(f"--{side}", type=int, default=size, help="items that choose")
    asked = parser.parse_args()
    sizes = {"harmful": asked.harmful, "harmless": asked.harmless, "task": asked.task}
    rows = [load(path) for path in sorted(KEPT.glob("*-*.json"))]
    print(f"rows: {', '.join(f'{row.name}-{row.seed}' for row in rows)}; {sizes} items choose")
    print("| method | price | R_s | R_u | added | of a draw: ± R_s | ± added |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method, title in METHODS.items():
        having = [row for row in rows if method in row.facts["entries"]]
        draws = [drawn(row, method, sizes, number) for number, row in enumerate(having)]
        tuned = [row.scores[ENDS[1]]["harmless"].mean() for row in having]
        for price in PRICES if having else ():
            figures = []
            for one, level in zip(draws, tuned, strict=True):
                taken = []
                for candidates, rest in one:
                    rule = ChoiceRule(price=price)
                    scored = [
                        replace(c, score=rule.score(c.recovery, c.retention, c.excess)) for c in candidates.values()
                    ]
                    best = rest[choose(scored, rule).strength]
                    taken.append((best.recovery, best.retention, best.measured.harmless_refused - level))
                figures.append(np.array(taken))
            mean = 100 * np.mean([f.mean(axis=0) for f in figures], axis=0)
            spread = 100 * np.mean([f.std(axis=0) for f in figures], axis=0)
            name = f"**{price:g}**" if price == ChoiceRule.price else f"{price:g}"
            shown = f"{mean[0]:.0f} | {mean[1]:.0f} | {mean[2]:+.1f} | {spread[0]:.0f} | {spread[2]:.1f}"
            print(f"| {title} | {name} | {shown} |")


if __name__ == "__main__":
    main()
