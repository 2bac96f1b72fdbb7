"""The embedded judge of harm on prompts that it has not seen: what each block of features brings, and what it costs.

Rows: PKU-SafeRLHF's pairs without BeaverTails' prompts. Five random splits by prompt, a fifth of the prompts held out;
and the prompts of one part in five, kept apart while features and sizes were chosen. AUC over distinct rows, and with
every row counted as often as the published file holds it, which is how .68 comes about for TF-IDF alone. BeaverTails
is judged by a judge trained on the pairs.

    python benchmarks/judging_harm.py DATA_DIR [--local MODEL --states FILE.npz] [--json]

Hidden states take minutes: they are kept in FILE.npz, and taken from there where it has them.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import finish
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import GroupShuffleSplit

from resafe.data.sources import read_file
from resafe.evals.embedded import LocalModel, fit_head
from resafe.evals.embedded.heads import fold_of
from resafe.evals.judge import Judged
from resafe.evals.labelled import Labelled, load_labelled, overlap_key, without_prompts
from resafe.evals.labelled.sets import SETS

SPLITS, TIMED = 5, 10_000
KINDS: dict[str, dict[str, bool]] = {"words_only": {"words_only": True}, "without_signs": {"signs": False}, "signs": {}}


def hidden_states(local: LocalModel, rows: Sequence[Labelled], kept: Path | None) -> np.ndarray:
    """The rows' states, from the file where it has them."""
    keys = [
        hashlib.sha256(f"{local.digest} {local.layer}\0{r.prompt}\0{r.response}".encode()).hexdigest() for r in rows
    ]
    known: dict[str, np.ndarray] = {}
    if kept is not None and kept.is_file():
        with np.load(kept) as file:
            known = dict(zip(file["keys"].tolist(), file["states"], strict=True))
    missing = {key: row.judged() for key, row in zip(keys, rows, strict=True) if key not in known}
    known |= dict(zip(missing, local.states(list(missing.values())), strict=True))
    if kept is not None and missing:
        np.savez(kept, keys=np.array(list(known)), states=np.array(list(known.values()), dtype=np.float32))
    return np.array([known[key] for key in keys], dtype=np.float64)


def main() -> None:
    """Prints the figures."""
    root = Path(sys.argv[1])
    local = LocalModel.open(_option("--local")) if "--local" in sys.argv else None
    test, pairs = load_labelled("beavertails", root), load_labelled("pku_saferlhf", root)
    rows = without_prompts(pairs, {overlap_key(row.prompt) for row in test})
    kinds: dict[str, dict] = dict(KINDS)
    states = seen = None
    if local is not None:
        both = hidden_states(local, [*rows, *test], Path(_option("--states")) if "--states" in sys.argv else None)
        states, seen = both[: len(rows)], both[len(rows) :]
        kinds["local"] = {"local": local}
    labels, human = np.array([row.harm for row in rows]), np.array([row.harm for row in test])
    times = _times_published(root, rows)

    def probabilities(kind: str, train: np.ndarray, judged: Sequence[Judged], of: np.ndarray | None) -> np.ndarray:
        known = states[train] if states is not None and kind == "local" else None
        return fit_head([rows[n] for n in train], "harm", states=known, **kinds[kind]).probabilities(judged, of)

    figures: dict[str, float] = {"rows": len(rows), "prompts": len({overlap_key(row.prompt) for row in rows})}

    def on_pairs(name: str, splits: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        found: dict[str, list[list[float]]] = {}
        for train, held in splits:
            for kind in kinds:
                of = None if states is None else states[held]
                said = probabilities(kind, train, [rows[n].judged() for n in held], of)
                aucs = [roc_auc_score(labels[held], said, sample_weight=weight) for weight in (None, times[held])]
                found.setdefault(kind, []).append(aucs)
        for kind, aucs in found.items():
            for column, counted in enumerate(("", "_as_published")):
                values = np.array(aucs)[:, column]
                figures[f"auc_{name}_{kind}{counted}"] = float(values.mean())
                if len(values) > 1:
                    figures[f"auc_{name}_{kind}{counted}_sd"] = float(values.std(ddof=1))
        _show(figures)

    apart = np.array([fold_of(row.prompt, 5) == 0 for row in rows])
    on_pairs("kept_apart", [(np.flatnonzero(~apart), np.flatnonzero(apart))])
    prompts = [overlap_key(row.prompt) for row in rows]
    on_pairs("splits", list(GroupShuffleSplit(SPLITS, test_size=0.2, random_state=5).split(rows, groups=prompts)))
    for kind in kinds:
        said = probabilities(kind, np.arange(len(rows)), [row.judged() for row in test], seen)
        figures[f"auc_beavertails_{kind}"] = float(roc_auc_score(human, said))
        figures[f"f1_beavertails_{kind}"] = float(f1_score(human, said >= 0.5))
    figures |= _seconds(rows, local, states)
    _show(figures)
    finish(figures)


def _times_published(root: Path, rows: Sequence[Labelled]) -> np.ndarray:
    """How often the published file holds each row."""
    read = SETS["pku_saferlhf"]
    every = Counter(
        (row.prompt, row.response, row.harm) for line in read_file(root / read.file) for row in read.read(line, "")
    )
    return np.array([every[(row.prompt, row.response, row.harm)] for row in rows], dtype=float)


def _seconds(rows: Sequence[Labelled], local: LocalModel | None, states: np.ndarray | None) -> dict[str, float]:
    """Seconds for 10,000 responses, by the clock and of processor time; with the model by a tenth of them."""
    found = {}
    for name, model, count in (("signs", None, TIMED), ("local", local, TIMED // 10)):
        if name == "local" and local is None:
            continue
        head = fit_head(rows, "harm", local=model, states=None if model is None else states)
        many = [rows[n % len(rows)].judged() for n in range(count)]
        head.probabilities(many[:8])  # loads the model
        wall, cpu = time.perf_counter(), time.process_time()
        head.probabilities(many)
        found[f"seconds_10k_{name}"] = (time.perf_counter() - wall) * TIMED / count
        found[f"cpu_seconds_10k_{name}"] = (time.process_time() - cpu) * TIMED / count
    return found


def _option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def _show(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        print(f"{name:50} {value:10.4f}", flush=True)
    print(flush=True)


if __name__ == "__main__":
    main()
