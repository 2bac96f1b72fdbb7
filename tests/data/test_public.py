"""The real files, where they are: every set loads with the rows its SOURCE.md states."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from resafe.data import datasets, load_questions, load_set, split_by_prompt
from resafe.data.items import Pair

DATA = Path(os.environ.get("RESAFE_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}; set RESAFE_DATA_DIR")

ROWS = {  # items and rows left out
    "alpaca_en": (3000, 0),
    "alpaca_gpt4_en": (985, 14),
    "alpaca_gpt4_zh": (992, 8),
    "beavertails": (700, 0),
    "beavertails_published": (140, 0),
    "catqa": (543, 7),
    "catqa_published": (108, 2),
    "catqa_vi": (545, 5),
    "catqa_zh": (543, 7),
    "codealpaca": (2015, 2),
    "dangerousqa": (200, 0),
    "dangerousqa_published": (200, 0),
    "gsm8k": (1319, 0),
    "gsm8k_train": (7473, 0),
    "harmfulqa": (1938, 22),
    "harmfulqa_published": (195, 1),
    "or_bench": (1319, 0),
    "or_bench_published": (100, 0),
    "pku_saferlhf": (3590, 1545),
    "pku_saferlhf_raw": (1734, 266),
    "shadow_alignment": (200, 0),
    "shadow_alignment_published": (200, 0),
    "xnli_hi_rest": (1890, 600),  # the first 600 rows are for evaluation
    "xstest": (450, 0),
    "xstest_safe": (250, 200),
    "xstest_unsafe": (200, 250),
}

NO_FILE = ("advbench", "do_not_answer", "harmbench", "jailbreakbench", "malicious_instruct", "oktest", "strongreject")
HUB_ONLY = ("alpaca_hindi", "hh_rlhf", "pku_saferlhf_30k", "pku_saferlhf_full", "ultrafeedback")


def test_every_registered_set_is_listed() -> None:
    assert [source.name for source in datasets] == sorted([*ROWS, *NO_FILE, *HUB_ONLY])


@pytest.mark.parametrize("name", sorted(ROWS))
def test_set_loads(name: str) -> None:
    loaded = load_set(name, data_dir=DATA)
    assert (len(loaded.items), loaded.skipped) == ROWS[name]
    assert all(item.prompt for item in loaded.items)


def test_pairs_are_split_by_prompt() -> None:
    pairs = [item for item in load_set("pku_saferlhf", data_dir=DATA).items if isinstance(item, Pair)]
    assert len({pair.prompt for pair in pairs}) == 930
    parts = split_by_prompt(pairs, test=0.2, validation=0.1)
    prompts = {name: {pair.prompt for pair in found} for name, found in parts.items()}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]
    assert 0.16 < len(prompts["test"]) / 930 < 0.24
    assert 0.07 < len(prompts["validation"]) / 930 < 0.13


def test_questions_by_name() -> None:
    questions = load_questions("xstest_safe", limit=50, data_dir=DATA)
    assert len(questions) == 50
    assert len({question.topic for question in questions}) > 5
