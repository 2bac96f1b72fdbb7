"""Selection by magnitude, sign election and sums, by hand."""

from __future__ import annotations

import pytest
import torch

from resafe.tensors import agreeing_mean, agreeing_sum, elect_sign, keep_top, trimmed, weighted_sum


def test_keep_top_gives_ties_to_the_lower_index():
    scores = torch.tensor([[1.0, 3.0, 2.0], [3.0, 2.0, -9.0]])
    assert keep_top(scores, 0.5).tolist() == [[0, 1, 1], [1, 0, 0]]  # 3, 3 and the first of the two 2s
    assert keep_top(torch.zeros(5), 0.4).tolist() == [1, 1, 0, 0, 0]
    assert keep_top(scores, 0.0).sum() == 0
    assert keep_top(scores, 1.0).sum() == 6


def test_trimmed_keeps_what_reaches_the_threshold():
    values = torch.tensor([0.5, -2.0, 1.0, -1.0], requires_grad=True)
    kept = trimmed(values, 1.0)
    assert kept.tolist() == [0, -2, 1, -1]
    kept.sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1]


def test_agreeing_sum_by_hand():
    a, b = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([4.0, 3.0, 0.0])
    assert agreeing_sum([a, b], [1, 0.5], torch.tensor([1.0, 1.0, 1.0])).tolist() == [4, 1.5, 0]


def test_elected_sign_by_hand():
    a, b = torch.tensor([2.0, -1.0, 0.0, 1.0]), torch.tensor([-3.0, -1.0, 0.0, -1.0])
    assert elect_sign([a, b], [1, 1]).tolist() == [-1, -1, 1, 1]  # ties of mass and zeros count as positive
    assert elect_sign([a, b], [2, 1]).tolist() == [1, -1, 1, 1]


def test_agreeing_mean_by_hand():
    a, b, c = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([4.0, 3.0, 0.0]), torch.tensor([-1.0, 0.0, 0.0])
    sign = elect_sign([a, b, c], [1, 1, 1])
    assert agreeing_mean([a, b, c], [1, 1, 1], sign).tolist() == [3, 3, 0]
    assert agreeing_mean([a, b, c], [1, 3, 1], sign).tolist() == [3.5, 3, 0]


def test_weighted_sum_accumulates_in_float32():
    # 256 + 1 is lost in bfloat16 (8 bits of mantissa), so accumulation there would give 256
    tensors = [torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)]
    total = weighted_sum(tensors, [1.0, 1.0])
    assert total.dtype == torch.float32
    assert total.item() == 257
    assert weighted_sum([torch.tensor([2.0]), torch.tensor([5.0])], [0.5, -1]).item() == -4
    for tensors, weights in (([], []), ([torch.ones(1)], [1.0, 2.0])):
        with pytest.raises(ValueError, match="tensors and"):
            weighted_sum(tensors, weights)
