"""The shipped sets: sizes, the fixed split, and no prompt in two parts."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import combinations

import pytest

from resafe.data import embedded
from resafe.data.dealt import dealt
from resafe.data.embedded import PARTS, HarmfulRow, harmful_rows, harmless_rows, plain_texts
from resafe.data.mixes import normalised
from resafe.errors import InputError


def test_harmful_parts() -> None:
    counts = {part: Counter(row.category for row in harmful_rows(part)) for part in PARTS}
    assert len(counts["test"]) == 14
    assert set(counts["test"].values()) == {12}
    assert set(counts["validation"].values()) == {8}
    assert sum(counts["train"].values()) == len(harmful_rows()) - 14 * 20 >= 210


def test_harmless_parts() -> None:
    look_alike = {part: Counter(row.category for row in harmless_rows(part, "look_alike")) for part in PARTS}
    assert set(look_alike["test"].values()) == {8}
    assert set(look_alike["validation"].values()) == {7}
    assert len(look_alike["test"]) == 14
    plain = {part: Counter(row.category for row in harmless_rows(part, "plain")) for part in PARTS}
    assert sum(plain["test"].values()) == 60
    assert sum(plain["validation"].values()) == 30
    split = [row for row in harmless_rows(kind="plain") if int(row.id.partition("-")[2]) <= 480]
    sizes = Counter(row.category for row in split)
    for category, size in sizes.items():
        assert abs(plain["test"][category] - 60 * size / sizes.total()) < 1
    for part in PARTS:
        kinds = Counter(row.kind for row in harmless_rows(part))
        assert kinds == {"look_alike": look_alike[part].total(), "plain": plain[part].total()}


def test_no_prompt_in_two_parts_and_no_row_lost() -> None:
    for load in (harmful_rows, harmless_rows):
        prompts = {part: {normalised(row.prompt) for row in load(part)} for part in PARTS}
        assert all(not prompts[a] & prompts[b] for a, b in combinations(PARTS, 2))
        assert sorted(row.id for part in PARTS for row in load(part)) == sorted(row.id for row in load())
        assert len({row.id for row in load()}) == len(load())
    asked = {normalised(row.prompt) for row in harmful_rows()}
    assert not asked & {normalised(row.prompt) for row in harmless_rows()}
    texts = {part: {row.text for row in plain_texts(part)} for part in PARTS}
    assert len(texts["validation"]) == 20
    assert not texts["train"]
    assert not texts["test"] & texts["validation"]
    assert len(plain_texts()) == len(texts["test"]) + 20


def test_split_is_stable_when_other_categories_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [vars(row) for row in harmful_rows()]
    before = {part: [row.id for row in harmful_rows(part)] for part in PARTS}
    extra = [vars(HarmfulRow(f"x-{i}", "jaywalking", f"Prompt {i}", "topic", "No.", "Sure.")) for i in range(35)]
    monkeypatch.setattr(embedded, "_read", lambda name: [*extra[:20], *reversed(rows), *extra[20:]])
    after = {part: sorted(row.id for row in harmful_rows(part) if row.category != "jaywalking") for part in PARTS}
    assert after == {part: sorted(ids) for part, ids in before.items()}


def test_split_rule_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another salt or rule would move training rows into the test, under results already published."""
    rows = [vars(HarmfulRow(f"r-{i}", "c", f"Prompt {i}", "t", "No.", "Yes.")) for i in range(24)]
    monkeypatch.setattr(embedded, "_read", lambda name: rows)
    by_digest = sorted(range(24), key=lambda i: hashlib.sha256(f"resafe-split-1:r-{i}".encode()).digest())
    assert {row.id for row in harmful_rows("test")} == {f"r-{i}" for i in by_digest[:12]}
    assert {row.id for row in harmful_rows("validation")} == {f"r-{i}" for i in by_digest[12:20]}
    assert [row.id for row in harmful_rows("test")][:5] == ["r-0", "r-4", "r-5", "r-7", "r-8"]


def test_shares_by_largest_remainder() -> None:
    assert dealt({"a": 5, "b": 3, "c": 2}, 7) == {"a": 4, "b": 2, "c": 1}  # 3.5, 2.1, 1.4
    assert dealt({"a": 1, "b": 1, "c": 1}, 2) == {"a": 1, "b": 1, "c": 0}


def test_unknown_parts_and_kinds() -> None:
    with pytest.raises(InputError, match="no part 'dev'"):
        harmful_rows("dev")
    with pytest.raises(InputError, match="no kind 'odd'"):
        harmless_rows(kind="odd")
