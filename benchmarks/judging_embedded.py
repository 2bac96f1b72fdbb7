"""The embedded judge: agreement with people on prompts it has not seen, and speed. Called by judging.py.

Refusal: cross-validated by prompt on XSTest. Harm: on BeaverTails, trained on PKU-SafeRLHF alone without
BeaverTails' prompts, and cross-validated with the other BeaverTails prompts in training too; a TF-IDF of the response
alone beside each, and what calling every response harmful would reach.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from sklearn.metrics import cohen_kappa_score, f1_score, roc_auc_score

from resafe.evals.embedded import cross_validated, fit_head
from resafe.evals.embedded.judge import Embedded
from resafe.evals.embedded.trained import TrainedJudge
from resafe.evals.judge import Judged, judge_all
from resafe.evals.labelled import load_labelled, overlap_key, without_prompts

TIMED = 10_000


def measure(root: Path) -> dict[str, float]:
    """All figures."""
    return refusal(root) | harm(root)


def refusal(root: Path) -> dict[str, float]:
    """Cross-validated on XSTest, and seconds for 10,000 responses with a judge trained on all of it."""
    rows = load_labelled("xstest", root)
    human, models = np.array([row.refusal for row in rows]), np.array([row.model for row in rows])
    figures = {}
    for name, settings in (("", {}), ("_words_only", {"words_only": True})):
        found = cross_validated(rows, "refusal", **settings) >= 0.5
        by_model = {m: cohen_kappa_score(human[models == m], found[models == m]) for m in sorted(set(models))}
        figures[f"kappa_xstest_embedded{name}"] = float(cohen_kappa_score(human, found))
        figures[f"kappa_xstest_embedded_worst_model{name}"] = float(min(by_model.values()))
    judge = Embedded(TrainedJudge({"refusal": fit_head(rows, "refusal")}, frozenset()), "refusal", 0.5)
    many = [Judged(str(n), rows[n % len(rows)].prompt, rows[n % len(rows)].response) for n in range(TIMED)]
    start = time.perf_counter()
    judge_all(judge, many)
    return figures | {"embedded_seconds_10k": time.perf_counter() - start}


def harm(root: Path) -> dict[str, float]:
    """On BeaverTails, never trained on the prompts that are judged."""
    test, pairs = load_labelled("beavertails", root), load_labelled("pku_saferlhf", root)
    human = np.array([row.harm for row in test])
    others = without_prompts(pairs, {overlap_key(row.prompt) for row in test})
    labels = np.array([row.harm for row in others])
    everything = float(f1_score(human, np.ones_like(human)))
    figures = {"harmful_f1_beavertails_all_called_harmful": everything}
    for name, settings in (("", {}), ("_words_only", {"words_only": True})):
        alone = fit_head(others, "harm", **settings).probabilities([row.judged() for row in test])
        held_out = cross_validated(others, "harm", **settings)
        both = cross_validated([*test, *others], "harm", **settings)[: len(test)]
        figures[f"harmful_f1_beavertails{name}"] = float(f1_score(human, both >= 0.5))
        figures[f"harmful_auc_beavertails{name}"] = float(roc_auc_score(human, both))
        figures[f"harmful_f1_beavertails_pku_only{name}"] = float(f1_score(human, alone >= 0.5))
        figures[f"harmful_auc_beavertails_pku_only{name}"] = float(roc_auc_score(human, alone))
        figures[f"harmful_auc_pku_held_out{name}"] = float(roc_auc_score(labels, held_out))
    return figures
