"""A trained judge as files: numbers in safetensors, words and origins in JSON. Nothing in them is ever executed.

It keeps digests of the prompts it was trained on, so that it is never measured on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from resafe.errors import InputError
from resafe.evals.embedded.dense import Standard
from resafe.evals.embedded.features import TEXTS, Words
from resafe.evals.embedded.heads import Head
from resafe.evals.embedded.lexicon import SIGNS
from resafe.evals.embedded.local import LocalModel
from resafe.evals.judge import Measure
from resafe.evals.labelled import Labelled, overlap_key
from resafe.provenance import digest_file, digest_value

NUMBERS, FACTS, FORMAT = "judge.safetensors", "judge.json", 2
KNOWN_FORMATS = (1, FORMAT)  # the first had no signs and no hidden states
RULE_FEATURES = 13


@dataclass(frozen=True)
class TrainedJudge:
    """One or two heads, and what they were trained on.

    Attributes:
        heads: Measure → head.
        prompts: `overlap_key` of every prompt trained on.
        facts: Sets, numbers of rows and cross-validated figures, for people.
    """

    heads: Mapping[Measure, Head]
    prompts: frozenset[str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what decides its verdicts."""
        return digest_value(
            {
                name: [head.bias, head.weights.tolist(), head.rules]
                + [[block.text, list(block.vocabulary), block.idf.tolist()] for block in head.words]
                + [[of.centre.tolist(), of.spread.tolist(), of.size] for of in (head.signs, head.states) if of]
                + ([[head.local.digest, head.local.layer]] if head.local else [])
                for name, head in sorted(self.heads.items())
            }
        )

    def saw(self, prompt: str) -> bool:
        """Whether it was trained on this prompt, up to case, punctuation and space."""
        return overlap_key(prompt) in self.prompts


def prompts_of(rows: Sequence[Labelled]) -> frozenset[str]:
    """The keys of all prompts of the rows."""
    return frozenset(overlap_key(row.prompt) for row in rows)


def write_trained(directory: Path, judge: TrainedJudge) -> None:
    """Writes `judge.safetensors`, then `judge.json`, which names the digest of the first."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {}
    heads: dict[str, Any] = {}
    for measure, head in judge.heads.items():
        tensors[f"{measure}.weights"] = head.weights
        tensors[f"{measure}.bias"] = np.array([head.bias])
        for number, block in enumerate(head.words):
            tensors[f"{measure}.idf.{number}"] = block.idf
        blocks = [{"text": block.text, "vocabulary": list(block.vocabulary)} for block in head.words]
        heads[measure] = {"rules": head.rules, "blocks": blocks}
        for name, scale in (("signs", head.signs), ("states", head.states)):
            if scale is not None:
                tensors[f"{measure}.{name}.centre"], tensors[f"{measure}.{name}.spread"] = scale.centre, scale.spread
                heads[measure][name] = scale.size
        if head.local is not None:
            heads[measure]["local"] = asdict(head.local)
    (directory / FACTS).unlink(missing_ok=True)  # a half-written judge has none
    save_file(tensors, directory / NUMBERS)
    document = {
        "format": FORMAT,
        "facts": dict(judge.facts),
        "numbers": digest_file(directory / NUMBERS),
        "prompts": sorted(judge.prompts),
        "heads": heads,
    }
    (directory / FACTS).write_text(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_trained(directory: Path) -> TrainedJudge:
    """Reads what `write_trained` wrote.

    Raises:
        InputError: Nothing there, a damaged or foreign file, or files that do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (directory / FACTS).is_file():
        raise InputError(f"no trained judge at {directory}", "train one: resafe judge train --help")
    try:
        document = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        if document["format"] not in KNOWN_FORMATS:
            raise InputError(
                f"{directory / FACTS} has format {document['format']!r}, this resafe reads {FORMAT}", "train it again"
            )
        if document["numbers"] != digest_file(directory / NUMBERS):
            raise InputError(f"{directory}: {NUMBERS} is not the file that {FACTS} was written for", "train it again")
        tensors = load_file(directory / NUMBERS)
        heads = {name: _head(name, values, tensors) for name, values in document["heads"].items()}
        return TrainedJudge(heads, frozenset(document["prompts"]), document["facts"])
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{directory} holds no trained judge: {error!r}", "train it again") from error


def _head(name: Any, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> Head:
    words = tuple(
        Words(block["text"], tuple(block["vocabulary"]), tensors[f"{name}.idf.{number}"])
        for number, block in enumerate(values["blocks"])
    )
    weights = tensors[f"{name}.weights"]
    signs, states = _scale(name, "signs", values, tensors), _scale(name, "states", values, tensors)
    local = LocalModel(**values["local"]) if "local" in values else None
    wide = sum(len(block.vocabulary) for block in words) + (RULE_FEATURES if values["rules"] else 0)
    wide += sum(len(scale.centre) for scale in (signs, states) if scale is not None)
    fits = all(block.text in TEXTS and block.idf.shape == (len(block.vocabulary),) for block in words)
    fits = fits and (signs is None or signs.centre.shape == (SIGNS,)) and (local is None) == (states is None)
    if name not in ("refusal", "harm") or weights.shape != (wide,) or not fits:
        raise ValueError(f"the head {name!r} does not fit its numbers")
    bias = float(tensors[f"{name}.bias"][0])
    return Head(name, words, bool(values["rules"]), weights, bias, signs, local, states)


def _scale(measure: str, name: str, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> Standard | None:
    """The scale of a block of numbers; None where the head has no such block."""
    if name not in values:
        return None
    centre, spread = tensors[f"{measure}.{name}.centre"], tensors[f"{measure}.{name}.spread"]
    if centre.ndim != 1 or centre.shape != spread.shape:
        raise ValueError(f"the scale of {name} is damaged")
    return Standard(centre, spread, float(values[name]))
