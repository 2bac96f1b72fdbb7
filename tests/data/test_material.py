"""Training material from named sets: shares, rounds, openings, and nothing that is also a question."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from resafe.data.embedded import harmful_rows, harmless_rows
from resafe.data.items import Pair, Question
from resafe.data.material import Material, load_material
from resafe.data.pairs import SHORT_REFUSALS
from resafe.errors import InputError


def material(safety: int = 3, harmless: int = 5) -> Material:
    return Material(
        tuple(Pair(f"s{i}", f"bad {i}", f"no {i}", f"yes {i}", "safety") for i in range(safety)),
        tuple(Pair(f"h{i}", f"good {i}", f"help {i}", "no", "harmless") for i in range(harmless)),
    )


def test_alignment_examples_have_the_share_and_go_round_each_side() -> None:
    examples = material().align_examples(20, 0.6, seed=1)
    refusals = [e.prompt for e in examples if e.prompt.startswith("bad")]
    assert len(examples) == 20
    assert len(refusals) == 12
    assert set(Counter(refusals).values()) == {4}  # 12 of 3 prompts: four whole rounds
    helpful = Counter(e.prompt for e in examples if e.prompt.startswith("good"))
    assert sorted(helpful.values()) == [1, 1, 2, 2, 2]  # 8 of 5 prompts: none twice ahead of another
    assert len({e.id for e in examples}) == 20
    assert examples == material().align_examples(20, 0.6, seed=1)
    assert examples != material().align_examples(20, 0.6, seed=2)


def test_compliances_are_the_rejected_answers() -> None:
    assert [e.response for e in material().compliances] == ["yes 0", "yes 1", "yes 2"]


def test_embedded_material_is_the_training_part_without_questions() -> None:
    loaded = load_material(["embedded"], ["embedded"])
    assert len(loaded.safety) == len(harmful_rows("train"))
    assert len(loaded.harmless) == len(harmless_rows("train"))
    asked = Question("q", harmful_rows("train")[0].prompt.upper() + "!")
    fewer = load_material(["embedded"], ["embedded"], questions=[asked])
    assert (len(fewer.safety), fewer.dropped) == (len(loaded.safety) - 1, 1)


def test_limits_and_opening() -> None:
    loaded = load_material(
        ["embedded"], ["embedded"], safety_limit=7, harmless_limit=9, helpful_opening="Sure. ", seed=3
    )
    assert (len(loaded.safety), len(loaded.harmless)) == (7, 9)
    assert all(pair.chosen.startswith("Sure. ") and not pair.rejected.startswith("Sure. ") for pair in loaded.harmless)
    assert len({pair.prompt for pair in loaded.safety}) == 7


def test_nothing_left_is_an_error() -> None:
    asked = [Question(row.id, row.prompt) for row in harmful_rows("train")]
    with pytest.raises(InputError, match="no safety pairs are left"):
        load_material(["embedded"], ["embedded"], questions=asked)


def test_short_refusals_stand_for_the_advice_of_public_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{i}", "response_0": "Do think again.", "response_1": "yes", "is_response_0_safe": True,
         "is_response_1_safe": False} for i in range(40)
    ]  # fmt: skip
    file = tmp_path / "pku_saferlhf" / "raw_columns_rebuilt2000.jsonl"
    file.parent.mkdir()
    file.write_text("\n".join(json.dumps(row) for row in rows))
    sets = ["pku_saferlhf_raw", "embedded"]
    plain = load_material(sets, ["embedded"], data_dir=tmp_path).safety
    short = load_material(sets, ["embedded"], data_dir=tmp_path, short_refusals=True).safety
    public = [pair for pair in short if pair.prompt in {row["prompt"] for row in rows}]
    assert len(public) == 40
    assert {pair.chosen for pair in public} == set(SHORT_REFUSALS)  # 40 draws of 6 miss one with probability 0.4 %
    assert all(pair.rejected == "yes" for pair in public)
    own = {pair for pair in short if pair not in public}
    assert own == {pair for pair in plain if pair.chosen != "Do think again."}
