"""Rows and seeds of benchmarks/realign.py: what the recipe asks of them, and what is kept of a run."""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from resafe.evals.refusal import rules_digest
from resafe.masks import PRESETS
from resafe.provenance import described, digest_value
from resafe.realign import REALIGN
from resafe.recipe.select import Candidate, ChoiceRule, Measured, choose
from resafe.report import read_records, read_results

HERE = Path(__file__).parent
KEPT = HERE / "realign"
RECIPE = HERE.parent / "recipes" / "realign.yaml"
ROWS: dict[str, tuple[str, ...]] = {
    "a10": ("tune.task.task=arithmetic", "tune.task.harmful_share=0.1"),
    "b10": ("tune.task.task=extraction", "tune.task.harmful_share=0.1"),
    "a20": ("tune.task.task=arithmetic", "tune.task.harmful_share=0.2"),
    "a0": ("tune.task.task=arithmetic", "tune.task.harmful_share=0.0"),
    # all weights: rates a fifteenth of the adapters', the first that were tried (on seed 7) for aligning and tuning
    "a10-full": (
        "tune.task.task=arithmetic",
        "tune.task.harmful_share=0.1",
        "align.lora=null",
        "align.sft.learning_rate=1.0e-4",
        "tune.task.learning_rate=1.0e-4",
        "realign.sft.settings.learning_rate=3.3e-5",
        "realign.dpo.settings.learning_rate=1.3e-5",
    ),
    "b0": ("tune.task.task=extraction", "tune.task.harmful_share=0.0"),
    "b20": ("tune.task.task=extraction", "tune.task.harmful_share=0.2"),
}
SIDES = ("harmful", "harmless", "task")
ENDS = ("aligned", "tuned-task")
REFERS = ("keep_rate_of", "mask_of")
ABLATIONS = HERE / "ablations.yaml"


@dataclass(frozen=True)
class Row:
    """One row and seed: member → side → scores (0 or 1, shape (items,)), and what is known of every member."""

    name: str
    seed: int
    facts: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]

    def members(self, method: str) -> list[str]:
        """The models of a method, weakest first."""
        return [m for m, known in self.facts["models"].items() if known["method"] == method and known["member"]]


def condense(run: Path, row: str, seed: int, digests: Mapping[str, Any]) -> dict[str, Any]:
    """A finished run as scores, a digit an item: table models by their names, members as name@strength.

    Args:
        run: Its directory.
        row: The row.
        seed: Its seed.
        digests: `row_digest` and `entry_digests` as they were when it began.
    """
    results = read_results(run / "results.json")
    known: dict[str, Any] = {
        item.model: {"method": item.model, "member": False, "perplexity": item.perplexity} for item in results.rows
    }
    records = read_records(run / "results.jsonl")
    if (run / "frontier.json").is_file():
        for method, members in json.loads((run / "frontier.json").read_text()).items():
            for member in members:
                known[member["model"]] = {"method": method, "member": True} | {
                    fact: value for fact, value in member.items() if fact != "model"
                }
        records += read_records(run / "frontier.jsonl")
    digits: dict[str, dict[str, list[str]]] = {name: {side: [] for side in SIDES} for name in known}
    for record in records:
        digits[record.model][record.side].append("1" if record.score == 1.0 else "0")
    for name, sides in digits.items():
        known[name]["scores"] = {side: "".join(column) for side, column in sides.items()}
    first, made = next(iter(known)), digests["entries"]
    return {
        "row": row,
        "seed": seed,
        "sets": {side: set_lengths([r.id for r in records if (r.model, r.side) == (first, side)]) for side in SIDES},
        "recipe": digests["recipe"],
        "entries": {name: made[name] for name in {one["method"] for one in known.values()} if name in made},
        "date": datetime.now(UTC).date().isoformat(),
        "minutes": round(results.seconds / 60, 1),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "titles": {item.model: item.method for item in results.rows},
        "models": known,
    }


def joined(kept: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What was kept of a row and seed, with what was run since in place of what it replaces.

    Raises:
        SystemExit: The aligned or the tuned model answers otherwise than it did, so that the two cannot be compared.
    """
    for name in ENDS:
        if kept["models"][name]["scores"] != found["models"][name]["scores"]:
            raise SystemExit(
                f"{kept['row']}-{kept['seed']}: {name} answers otherwise here than where the rest was run; "
                f"remove its file to run all of it here"
            )
    redone = set(found["entries"])
    stay = {name: one for name, one in kept["models"].items() if one["method"] not in redone}
    return {
        **found,
        "entries": kept["entries"] | found["entries"],
        "minutes": kept["minutes"],  # of the whole row: what is run since shares its first stages
        "titles": kept["titles"] | found["titles"],
        "models": stay | {name: one for name, one in found["models"].items() if name not in ENDS},
    }


def set_lengths(ids: Sequence[str]) -> list[tuple[str, int]]:
    """The sets that items come from, in order, with how many of each; an id begins with its set's name."""
    return [(name, len(list(few))) for name, few in itertools.groupby(identity.rpartition("-")[0] for identity in ids)]


def load(path: Path) -> Row:
    """What `condense` kept, less the entries that were run otherwise than the recipe has them now.

    Strengths are chosen anew, from the validation figures kept, so that another price of over-refusal needs no run.
    """
    facts, made = rechosen(json.loads(path.read_text())), entry_digests()
    facts["entries"] = {name: digest for name, digest in facts["entries"].items() if made.get(name) == digest}
    scores = {
        name: {side: np.array([int(c) for c in text], dtype=float) for side, text in known["scores"].items()}
        for name, known in facts["models"].items()
    }
    return Row(facts["row"], facts["seed"], facts, scores)


def rechosen(facts: dict[str, Any]) -> dict[str, Any]:
    """The same facts with each entry's model and `chosen` by the rule for strengths as it is now."""
    own = written()["questions"]["validation"]
    rule = ChoiceRule(price=own.get("over_refusal_price", ChoiceRule.price))
    families: dict[str, dict[float, dict[str, Any]]] = {}
    for known in facts["models"].values():
        if "validation" in known:
            families.setdefault(known["method"], {})[known["strength"]] = known
    _check_one_line(facts, [known["validation"] for known in facts["models"].values() if "validation" in known])
    for method, members in families.items():
        candidates = []
        for strength, known in members.items():
            seen = known["validation"]
            ratios = [seen[name] for name in ("recovery", "retention", "excess")]
            candidates.append(Candidate(strength, Measured(**seen["measured"]), *ratios, rule.score(*ratios)))
        best = choose(candidates, rule).strength
        for strength, known in members.items():
            known["chosen"] = strength == best
        facts["models"][method] |= {fact: members[best][fact] for fact in ("scores", "perplexity")}
    return facts


def _check_one_line(facts: Mapping[str, Any], seen: Sequence[Mapping[str, Any]]) -> None:
    """Raises SystemExit where ratios are not all of one aligned and one tuned model: then they are of two rows.

    R_s is linear in the share refused, R_u in the task's score, with the row's two models for coefficients.
    """
    for rate, ratio in (("harmful_refused", "recovery"), ("utility", "retention")):
        points = np.array([[one["measured"][rate], one[ratio]] for one in seen])
        if len(points) < 3 or np.ptp(points[:, 0]) == 0:
            continue
        first, last = points[points[:, 0].argmin()], points[points[:, 0].argmax()]
        slope = (last[1] - first[1]) / (last[0] - first[0])
        if np.abs(first[1] + slope * (points[:, 0] - first[0]) - points[:, 1]).max() > 1e-6:
            raise SystemExit(f"{facts['row']}-{facts['seed']}: the validation figures ({ratio}) are of several rows")


@cache
def written() -> Mapping[str, Any]:
    """The recipe, as it is written, and the ablations."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text())
    recipe["realign"] |= ablations()
    return recipe


@cache
def ablations(row: str | None = None) -> Mapping[str, Any]:
    """The entries that the recipe does not have: those of one row, or all; each is run with one seed (`asked`)."""
    found: dict[str, Any] = {}
    for place, entries in read_ablations().items():
        found |= entries if row in (None, place.rpartition("-")[0]) else {}
    return found


@cache
def read_ablations() -> Mapping[str, Mapping[str, Any]]:
    """Row-seed → its entries."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(ABLATIONS.read_text())
    return found


def row_digest(row: str) -> str:
    """Digest of what all models of a row have in common: what is kept of another recipe is not shown beside it."""
    common = {key: value for key, value in written().items() if key not in ("name", "title", "realign")}
    return digest_value([common, ROWS[row], rules_digest()])


def entry_digests() -> dict[str, str]:
    """Entry of `realign` → digest of how its models are made: its preset and the entry whose mask it uses, too."""
    found: dict[str, str] = {}
    for name, entry in written()["realign"].items():
        own = {key: value for key, value in entry.items() if key not in ("title", "kind")}
        preset = (
            [described(PRESETS[own.get("settings", {}).get("preset", "default")])] if own["method"] == "somf" else []
        )
        method = REALIGN.get(own["method"])
        defaults = [[p.name, repr(p.default)] for p in method.parameters if p.name not in method.traits["later"]]
        found[name] = digest_value([own, defaults, *preset, *(found[other] for other in referred(entry))])
    return found


def referred(entry: Mapping[str, Any]) -> list[str]:
    """The entries whose masks an entry uses or measures."""
    given = [entry[key] for key in REFERS if key in entry]
    return [name for one in given for name in ([one] if isinstance(one, str) else one)]


def asked(row: str, seed: int) -> list[str]:
    """The entries that a row has with a seed."""
    own = read_ablations().get(f"{row}-{seed}", {})
    return [name for name in written()["realign"] if name in own or name not in ablations()]


def missing(row: str, seed: int) -> list[str]:
    """The entries of the recipe that were not run, or not as they are now."""
    kept, made = read_kept(row, seed), entry_digests()
    return [name for name in asked(row, seed) if kept is None or kept["entries"].get(name) != made[name]]


def read_kept(row: str, seed: int) -> dict[str, Any] | None:
    """What is kept of a row and seed; None if that is nothing, or of another recipe."""
    path = KEPT / f"{row}-{seed}.json"
    facts: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return facts if facts is not None and facts["recipe"] == row_digest(row) else None
