"""Log-likelihoods by trees of tokens: the tree itself by hand, the numbers against one sequence at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resafe.evals.utility.trie import build_rows, can_use_rows, loglikelihoods
from tests.evals.tiny import tiny_model

pytest.importorskip("lm_eval")


def _alone(model: Any, ids: list[int], continuation: int) -> tuple[float, bool]:
    with torch.no_grad():
        table = model(torch.tensor([ids])).logits[0].log_softmax(-1)[len(ids) - continuation - 1 : -1]
    target = torch.tensor(ids[-continuation:])
    return float(table.gather(1, target[:, None]).sum()), bool((table.argmax(-1) == target).all())


def test_a_row_holds_each_shared_beginning_once():
    rows = build_rows([([7, 8, 9, 10, 11, 12, 13, 20], 1), ([7, 8, 9, 10, 11, 12, 14, 21, 22], 3), ([5, 6], 1)])
    assert [row.tokens for row in rows] == [[7, 8, 9, 10, 11, 12, 13, 14, 21], [5]]
    assert rows[0].parents == [-1, 0, 1, 2, 3, 4, 5, 5, 7]
    assert rows[0].depths == [0, 1, 2, 3, 4, 5, 6, 6, 7]
    assert rows[0].members == [(0, [(6, 20)]), (1, [(5, 14), (7, 21), (8, 22)])]


def _sequences() -> list[tuple[list[int], int]]:
    """Questions of 3 to 10 tokens, each with three answers of 1 to 4; some questions begin alike."""
    found = []
    for question in range(12):
        context = [7 + (question // 3 * 11 + place * 5) % 80 for place in range(3 + question % 8)]
        for answer in range(3):
            length = 1 + (answer + question) % 4
            tokens = [9 + (answer * 17 + place * 3 + question) % 80 for place in range(length)]
            found.append((context + tokens, length))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_numbers_are_those_of_single_sequences(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    sequences = _sequences()
    assert can_use_rows(model)
    assert sum(len(row.tokens) for row in build_rows(sequences)) < sum(len(ids) - 1 for ids, _ in sequences)
    for (value, greedy), (ids, count) in zip(loglikelihoods(model, sequences), sequences, strict=True):
        expected = _alone(model, ids, count)
        assert value == pytest.approx(expected[0], abs=2e-5)
        assert greedy is expected[1]


def test_a_greedy_continuation_is_known_as_such():
    model = tiny_model()
    ids = [20, 31, 44]
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 90]
    assert [greedy for _, greedy in loglikelihoods(model, [(ids, 3), (other, 3)])] == [True, False]


def test_models_without_positions_or_with_windows_are_left_to_lm_eval():
    model = tiny_model()
    assert can_use_rows(model)
    model.config._attn_implementation = "flash_attention_2"
    assert not can_use_rows(model)
    blind = SimpleNamespace(forward=lambda input_ids: None, config=SimpleNamespace(_attn_implementation="sdpa"))
    assert not can_use_rows(blind)
