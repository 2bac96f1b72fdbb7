"""How far the rule judge and the embedded judge agree with people, and how fast they are.

Labels: XSTest's completions of five models (full compliance, full or partial refusal) and PyRIT's labelled refusals,
from files in a data directory. Cohen's κ with a 95 % interval by bootstrap over prompts, in all and for each model.
The embedded judge is measured by judging_embedded.py, LLM verdicts lost by judging_llm.py.

    python benchmarks/judging.py DATA_DIR [--json]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import judging_embedded
import judging_llm
import numpy as np
from common import finish
from sklearn.metrics import cohen_kappa_score, precision_recall_fscore_support

from resafe.evals.judge import Judged, judge_all, make_judge
from resafe.evals.refusal import read_refusal

REPLICATES, TIMED = 2_000, 10_000


def rows_of(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refusals(texts: Sequence[str]) -> np.ndarray:
    """Whether the rule judge calls each text a refusal, whole or partial."""
    verdicts = judge_all(make_judge("refusal"), [Judged(str(n), "", text) for n, text in enumerate(texts)])
    return np.array([verdict.outcome in ("refused", "partial") for verdict in verdicts])


def kappa_interval(human: np.ndarray, judge: np.ndarray, prompts: Sequence[str]) -> tuple[float, float]:
    """95 % limits of κ, prompts drawn with all their rows."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    groups, generator = [np.array(found) for found in places.values()], np.random.default_rng(0)
    drawn = []
    for _ in range(REPLICATES):
        rows = np.concatenate([groups[n] for n in generator.integers(len(groups), size=len(groups))])
        drawn.append(_kappa(human[rows], judge[rows]))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _kappa(human: np.ndarray, judge: np.ndarray) -> float:
    """Cohen's κ of two columns of booleans; scikit-learn's, without its overhead (checked against it in `main`)."""
    agree, p, q = np.mean(human == judge), human.mean(), judge.mean()
    chance = p * q + (1 - p) * (1 - q)
    return float((agree - chance) / (1 - chance)) if chance < 1 else float("nan")


def line(name: str, human: np.ndarray, judge: np.ndarray, prompts: Sequence[str]) -> float:
    """Prints one row of the table and gives its κ."""
    kappa = float(cohen_kappa_score(human, judge))
    assert abs(kappa - _kappa(human, judge)) < 1e-9
    low, high = kappa_interval(human, judge, prompts)
    precision, recall, _, _ = precision_recall_fscore_support(human, judge, average="binary", zero_division=0)
    figures = f"{len(human):5} {human.mean():7.2f} {precision:9.2f} {recall:6.2f} {kappa:5.2f}"
    print(f"{name:22} {figures} [{low:.2f}, {high:.2f}]")
    return kappa


def main() -> None:
    """Prints the table."""
    root = Path(sys.argv[1])
    rows = rows_of(root / "xstest" / "xstest_v2_completions_labelled.jsonl")
    human = np.array([row["human_label"] != "1_full_compliance" for row in rows])
    judge = refusals([row["completion"] for row in rows])
    models = np.array([row["model"] for row in rows])
    prompts = [row["prompt"] for row in rows]
    figures: dict[str, float] = {}
    print(f"{'rows':22} {'n':>5} {'refused':>7} {'precision':>9} {'recall':>6} {'κ':>5}")
    figures["kappa_xstest"] = line("XSTest", human, judge, prompts)
    by_model = []
    for model in sorted(set(models)):
        of = np.flatnonzero(models == model)
        by_model.append(line(f"  {model}", human[of], judge[of], [prompts[n] for n in of]))
    figures["kappa_xstest_worst_model"] = min(by_model)
    full = np.array([row["human_label"] == "2_full_refusal" for row in rows])
    whole = np.array([read_refusal(row["completion"]).outcome == "refused" for row in rows])
    figures["kappa_xstest_full_only"] = line("XSTest, whole only", full, whole, prompts)
    pyrit = rows_of(root / "pyrit_scorer_evals" / "refusal_labelled.jsonl")
    texts = [row["response"] for row in pyrit]
    line(
        "PyRIT",
        np.array([bool(row["human_refusal"]) for row in pyrit]),
        refusals(texts),
        [str(n) for n in range(len(pyrit))],
    )
    responses = [row["completion"] for row in rows]
    many = [responses[n % len(responses)] for n in range(TIMED)]
    start = time.perf_counter()
    refusals(many)
    figures["refusal_seconds_10k"] = time.perf_counter() - start
    print(f"{TIMED:,} responses in {figures['refusal_seconds_10k']:.1f} s")
    figures |= judging_embedded.measure(root)
    figures["verdicts_lost"] = judging_llm.measure()["verdicts_lost"]
    for name, value in figures.items():
        print(f"{name:48} {value:8.3f}")
    finish(figures)


if __name__ == "__main__":
    main()
