"""Puts a finished run's table into README.md and docs, with the command: python benchmarks/readme.py runs/demo."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

from resafe.report import markdown_table, read_results


def main() -> None:
    """Replaces what stands between the table's markers."""
    root = Path(sys.argv[1])
    results = read_results(root / "results.json")
    note = (
        f"`resafe run recipes/{root.name}.yaml`: {results.seconds / 60:.1f} minutes "
        f"and {results.peak_memory_gb:.1f} GB on {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"seed {results.seed}; "
        f"{results.items['harmful']} harmful and {results.items['harmless']} harmless questions."
    )
    name = root.name
    table = markdown_table(results).partition("\n\n- ")[0]  # the notes below it are the report's
    block = f"<!-- table:{name} -->\n{table}\n\n{note}\n<!-- /table:{name} -->"
    pattern = re.compile(f"<!-- table:{name} -->.*?<!-- /table:{name} -->", re.DOTALL)
    for path in (Path("README.md"), *Path("docs/results").glob("*.md")):
        page = path.read_text()
        if pattern.search(page):
            path.write_text(pattern.sub(lambda _: block, page))


if __name__ == "__main__":
    main()
