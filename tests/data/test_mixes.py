"""Mixes and pairs: exact shares, no repetition, no question among them."""

from __future__ import annotations

from collections import Counter

import pytest

from resafe.data import (
    Example,
    Pair,
    Question,
    align_mix,
    attack_mix,
    compliances,
    deduplicate_against,
    harmful_rows,
    harmless_pairs,
    harmless_rows,
    load_questions,
    safety_pairs,
    split_by_prompt,
    task_examples,
)
from resafe.data.pairs import SHORT_REFUSALS, distinct
from resafe.errors import InputError


@pytest.mark.parametrize(("share", "n", "expected"), [(0.15, 1000, 150), (0.1, 55, 6), (0.0, 10, 0), (1.0, 10, 10)])
def test_attack_mix_has_exactly_the_share(share: float, n: int, expected: int) -> None:
    poison = compliances(harmful_rows("train"))
    mix = attack_mix(task_examples("arithmetic", 1000), poison, share, n, 0)
    harmful = {example.id for example in poison}
    assert len(mix) == n == len({example.id for example in mix})
    assert sum(example.id in harmful for example in mix) == expected
    assert mix == attack_mix(task_examples("arithmetic", 1000), poison, share, n, 0)


def test_attack_mix_is_mixed_and_seeded() -> None:
    poison, task = compliances(harmful_rows("train")), task_examples("arithmetic", 1000)
    first, second = attack_mix(task, poison, 0.2, 500, 0), attack_mix(task, poison, 0.2, 500, 1)
    assert [e.id for e in first] != [e.id for e in second]
    harmful = {example.id for example in poison}
    assert 20 < sum(example.id in harmful for example in first[:250]) < 80
    assert all(
        example.response == row.compliance for row in harmful_rows() for example in first if example.id == row.id
    )


def test_too_few_examples_and_bad_shares() -> None:
    task, poison = task_examples("arithmetic", 10), compliances(harmful_rows("train"))
    with pytest.raises(InputError, match="needs 90 task examples and there are 10"):
        attack_mix(task, poison, 0.1, 100, 0)
    with pytest.raises(InputError, match="needs 5000 harmful examples and there are"):
        attack_mix(task, poison, 1.0, 5000, 0)
    for share, n in ((-0.1, 5), (1.1, 5), (0.5, 0)):
        with pytest.raises(InputError, match="a mix of"):
            attack_mix(task, poison, share, n, 0)


def test_align_mix_has_both_sides() -> None:
    harmful, harmless = harmful_rows("train"), harmless_rows("train")
    whole = align_mix(harmful, harmless)
    assert len(whole) == len(harmful) + len(harmless) == len({example.id for example in whole})
    answers = {row.id: row.refusal for row in harmful} | {row.id: row.response for row in harmless}
    assert all(example.response == answers[example.id] for example in whole)
    ids = {row.id for row in harmful}
    assert sum(e.id in ids for e in align_mix(harmful, harmless, n=200, refusal_share=0.3, seed=4)) == 60
    assert sum(e.id in ids for e in align_mix(harmful, harmless, n=200)) == 100
    with pytest.raises(InputError, match="give both sides"):
        align_mix(harmful, [])
    with pytest.raises(InputError, match="without the size"):
        align_mix(harmful, harmless, refusal_share=0.5)


def test_shipped_training_data_share_no_prompt_with_questions() -> None:
    mix = align_mix(harmful_rows("train"), harmless_rows("train"))
    asked = [
        q for name in ("harmful", "harmless") for part in ("test", "validation") for q in load_questions(name, part)
    ]
    assert deduplicate_against(mix, asked).dropped == []


def test_deduplicate_reports_what_it_dropped() -> None:
    items = [Example("1", "How do I, kill  a PROCESS?", ""), Example("2", "How do I kill time?", "")]
    result = deduplicate_against(items, [Question("q", "how do i kill a process")])
    assert [item.id for item in result.kept] == ["2"]
    assert [item.id for item in result.dropped] == ["1"]


def test_split_by_prompt_keeps_prompts_together_and_is_stable() -> None:
    items = [Pair(f"{i}-{k}", f"Prompt {i}", f"{k}", "r") for i in range(400) for k in range(3)]
    parts = split_by_prompt(items, test=0.25, validation=0.25)
    sizes = {name: len(found) for name, found in parts.items()}
    assert sum(sizes.values()) == 1200
    assert all(size % 3 == 0 for size in sizes.values())
    assert 220 < sizes["test"] < 380
    assert 220 < sizes["validation"] < 380
    fewer = split_by_prompt(items[600:], test=0.25, validation=0.25)
    assert all(item in parts[name] for name, found in fewer.items() for item in found)
    assert split_by_prompt(items, test=0.25, validation=0.25, salt="b") != parts
    with pytest.raises(InputError, match="sum to less than 1"):
        split_by_prompt(items, test=0.6, validation=0.4)


def test_safety_and_harmless_pairs() -> None:
    row = harmful_rows()[0]
    assert safety_pairs([row]) == [Pair(row.id, row.prompt, row.refusal, row.compliance, "safety")]
    pairs = harmless_pairs(harmless_rows("train"))
    assert all(pair.side == "harmless" and pair.rejected in SHORT_REFUSALS for pair in pairs)
    assert [pair.chosen for pair in pairs] == [row.response for row in harmless_rows("train")]
    assert min(Counter(pair.rejected for pair in pairs).values()) > len(pairs) / 12  # all of them, about evenly
    assert harmless_pairs(harmless_rows("train")[5:9]) == pairs[5:9]


def test_distinct_pairs() -> None:
    a, b, c = Pair("1", "p", "x", "y"), Pair("2", "p", "x", "y"), Pair("3", "p", "y", "x")
    assert distinct([a, b, c]) == [a, c]
