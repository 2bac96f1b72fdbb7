"""Ways to restore safety, compared at all their strengths on real data: what docs/results/realign.md shows.

    python benchmarks/realign.py --data-dir DIR                       rows and seeds that are missing, then the page
    python benchmarks/realign.py --data-dir DIR --rows a10 --seeds 0
    python benchmarks/realign.py --data-dir DIR --rows a10 --seeds 1 --entries rank,row     some ways back alone
    python benchmarks/realign.py --report                             the page alone, from what is there

A row is a task and a share of harmful examples; each row and seed is a run of a recipe. What was scored is kept in
benchmarks/realign/ROW-SEED.json, a digit an item, so what is finished is never run again: a way back that is added to
the recipe, or changed, is run alone. A run has one thread: two seeds can run beside each other on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from realign_page import report
from realign_rows import KEPT, ROWS, condense, entry_digests, joined, missing, read_kept, referred, row_digest, written


def run(row: str, seed: int, names: set[str], data_dir: Path, out: Path) -> None:
    """Runs entries of the recipe for one row and seed in a process of its own and keeps their scores."""
    root = out / f"seed-{seed}"  # rows of a seed share the aligned model
    recipe, kept = dict(written()), read_kept(row, seed)
    for name, entry in reversed(recipe["realign"].items()):  # an entry that uses another's mask stands after it
        names |= set(referred(entry)) if name in names else set()
    recipe["realign"] = {name: entry for name, entry in recipe["realign"].items() if name in names}
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{row}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    changes = [one for one in ROWS[row] if not one.startswith("realign.") or one.split(".")[1] in names]
    command = [sys.executable, "-m", "resafe", "run", str(path), *changes, f"seed={seed}"]
    before = {"recipe": row_digest(row), "entries": entry_digests()}  # of the files as they are now
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # sums in another order would train other models
    subprocess.run([*command, "--data-dir", str(data_dir), "--out", str(root), "--quiet"], check=True, env=one_thread)
    facts = condense(root, row, seed, before)
    KEPT.mkdir(exist_ok=True)
    target = KEPT / f"{row}-{seed}.json"
    target.with_suffix(".part").write_text(json.dumps(joined(kept, facts) if kept else facts, indent=1) + "\n")
    target.with_suffix(".part").rename(target)


def main() -> None:
    """Runs what is missing, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--rows", default="a10,b10,a20")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--entries", help="only these of the recipe's entries, with those that they refer to")
    parser.add_argument("--out", type=Path, default=Path("runs/realign"))
    parser.add_argument("--report", action="store_true", help="write the page from what is there")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.rows.split(",")) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; rows: {', '.join(ROWS)}")
    if unknown := set((given.entries or "").split(",")) - {""} - set(written()["realign"]):
        parser.error(f"no entry {', '.join(sorted(unknown))}; entries: {', '.join(written()['realign'])}")
    if not given.report:
        if given.data_dir is None:
            parser.error("--data-dir is needed: the directory with the files of public sets")
        for seed in map(int, given.seeds.split(",")):
            for row in given.rows.split(","):
                wanted = set(missing(row, seed))
                if given.entries is not None:
                    wanted &= set(given.entries.split(","))
                if wanted:
                    run(row, seed, wanted, given.data_dir, given.out)
    summary = report()
    if given.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
