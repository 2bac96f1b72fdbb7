"""The published sets of labelled responses, read from a data directory. Holds none of their text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resafe.data.sources import Row, read_file
from resafe.errors import InputError
from resafe.evals.judge import Measure
from resafe.evals.labelled.rows import Labelled, unique_ids
from resafe.registry import nearest

Reader = Callable[[Row, str], Sequence[Labelled]]


@dataclass(frozen=True)
class LabelledSet:
    """A published set.

    Attributes:
        name: Its name on the command line.
        file: Its file in a data directory.
        measures: What its labels say.
        read: Rows of a row of the file, with the given id.
        title: One line for people.
        calibrates: Whether people labelled every response by itself: what judges are compared with. The two responses
            of a preference pair are labelled against each other, good enough to train on.
    """

    name: str
    file: str
    measures: Measure
    read: Reader
    title: str
    calibrates: bool = True


def _xstest(row: Row, number: str) -> Sequence[Labelled]:
    refused = row.text("human_label") != "1_full_compliance"
    text = str(row.value("completion") or "")
    return [Labelled(number, row.text("prompt"), text, refused, None, row.text("model"), "en", "xstest")]


def _pyrit(row: Row, number: str) -> Sequence[Labelled]:
    text = str(row.value("response") or "")
    return [Labelled(number, row.text("prompt"), text, row.flag("human_refusal"), None, "", "en", "pyrit")]


def _harm(name: str) -> Reader:
    def read(row: Row, number: str) -> Sequence[Labelled]:
        label = row.text("label")
        if label not in ("harmful", "unharmful"):
            raise InputError(f"{row.place}: label {label!r}", "it must be harmful or unharmful")
        text = str(row.value("response") or "")
        return [Labelled(number, row.text("prompt"), text, None, label == "harmful", "", "en", name)]

    return read


def _pairs(row: Row, number: str) -> Sequence[Labelled]:
    safer, worse = row.value("response")
    return [
        Labelled(f"{number}{letter}", row.text("prompt"), text, None, harm, "", "en", "pku_saferlhf")
        for letter, text, harm in (("a", safer, False), ("b", worse, True))
    ]


SETS = {
    found.name: found
    for found in (
        LabelledSet(
            "xstest",
            "xstest/xstest_v2_completions_labelled.jsonl",
            "refusal",
            _xstest,
            "XSTest: completions of five models, full compliance against full or partial refusal",
        ),
        LabelledSet(
            "pyrit",
            "pyrit_scorer_evals/refusal_labelled.jsonl",
            "refusal",
            _pyrit,
            "PyRIT: 169 responses; answers to something else count as refusals",
        ),
        LabelledSet(
            "beavertails",
            "judge_calibration/beavertails_test3021.jsonl",
            "harm",
            _harm("beavertails"),
            "BeaverTails: 3021 responses, harmful or not",
        ),
        LabelledSet(
            "saferlhf",
            "judge_calibration/safe_rlhf_test2000.jsonl",
            "harm",
            _harm("saferlhf"),
            "SafeRLHF: 2000 responses, harmful or not",
        ),
        LabelledSet(
            "pku_saferlhf",
            "pku_saferlhf/pku_seferlhf_realign_dpo_5k.json",
            "harm",
            _pairs,
            "PKU-SafeRLHF: pairs of which exactly one response is safe (training only)",
            calibrates=False,
        ),
    )
}
CALIBRATION = tuple(name for name, found in SETS.items() if found.calibrates)


def load_labelled(name: str, data_dir: Path | None) -> list[Labelled]:
    """The rows of a published set; those that are only for training without repetitions.

    Raises:
        InputError: No set of that name, no data directory, or the file is missing or wrong.
    """
    if name not in SETS:
        raise InputError(f"there is no labelled set {name!r}", nearest(name, SETS))
    if data_dir is None:
        raise InputError(f"the labelled set {name!r} is a file, and no directory is given", "give --data-dir DIRECTORY")
    found = SETS[name]
    rows = [
        labelled
        for number, row in enumerate(read_file(data_dir / found.file))
        for labelled in found.read(row, f"{name}-{number}")
    ]
    if found.calibrates:
        return unique_ids(rows)
    # A pair that is repeated, or a response that is in two pairs, teaches nothing new.
    return unique_ids(list({(row.prompt, row.response, row.harm): row for row in rows}.values()))
