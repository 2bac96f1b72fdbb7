"""Sampled decoding against the library's distributions, and apart from batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from resafe.errors import InputError
from resafe.evals import batching, generate
from resafe.evals.generation import _decoder, complete_tokens
from resafe.evals.sampling import Sampling, draw, uniforms
from tests.evals.tiny import ragged_prompts


@pytest.mark.parametrize(
    "kind", [Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, top_p=0.6), Sampling(0.9, 12, 0.8)]
)
def test_shares_are_those_of_the_library(kind: Sampling) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 2
    warped = TemperatureLogitsWarper(kind.temperature)(None, logits)
    if kind.top_k:
        warped = TopKLogitsWarper(kind.top_k)(None, warped)
    if kind.top_p < 1:
        warped = TopPLogitsWarper(kind.top_p)(None, warped)
    expected = torch.softmax(warped, -1)[0]
    steps = 20_000  # an even grid of numbers meets each token as often as its share says, up to a grid's step
    numbers = (torch.arange(steps) + 0.5) / steps
    found = draw(logits.expand(steps, -1), numbers, kind).bincount(minlength=40) / steps
    assert torch.allclose(found.float(), expected, atol=2.5 / steps)


def test_a_sample_depends_on_seed_and_prompt_alone(model: Any, tokenizer: Any) -> None:
    prompts = ragged_prompts(9)
    kind = Sampling(1.0, seed=4)
    together = generate(model, tokenizer, prompts, max_new_tokens=8, sampling=kind)
    for batch_size in (1, 4):
        assert generate(model, tokenizer, prompts, max_new_tokens=8, sampling=kind, batch_size=batch_size) == together
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=8, sampling=kind)[0] for prompt in prompts]
    assert alone == together
    other = generate(model, tokenizer, prompts, max_new_tokens=8, sampling=Sampling(1.0, seed=5))
    assert sum(a != b for a, b in zip(other, together, strict=True)) >= 7
    cold = generate(model, tokenizer, prompts, max_new_tokens=8, sampling=Sampling(1e-4, seed=4))
    assert cold == generate(model, tokenizer, prompts, max_new_tokens=8)  # towards 0 it is greedy


def test_numbers_are_counted() -> None:
    assert torch.equal(uniforms([5, 6], 9, 1)[:4], uniforms([5, 6], 4, 1))
    assert not torch.equal(uniforms([5, 6], 4, 1), uniforms([56], 4, 1))
    with pytest.raises(InputError, match="temperature must be above 0"):
        Sampling(0.0)


def test_the_batch_size_is_measured(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ragged_prompts(50)
    texts = generate(model, tokenizer, prompts, max_new_tokens=4)
    assert generate(model, tokenizer, prompts, max_new_tokens=4, batch_size="auto") == texts
    encoded = [[3 + n % 7] * (5 + n % 3) for n in range(300)]
    decoder = _decoder(model, tokenizer, encoded)
    cost = {16: 1.0, 32: 1.2, 64: 2.0, 128: 4.1}  # 128 rows are no faster a row than 64
    monkeypatch.setattr(batching, "_step_seconds", lambda _, __, ___, rows: cost[rows])
    assert batching.measured_batch_size(decoder, encoded, [8] * 300) == 60  # five even batches of at most 64

    def full(_: Any, __: Any, ___: Any, rows: int) -> float:
        if rows > 32:
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(batching, "_step_seconds", full)
    assert batching.measured_batch_size(decoder, encoded, [8] * 300) == 30
    assert batching.measured_batch_size(decoder, encoded[:9], [8] * 9) == 9


def test_batches_without_a_wanted_row_are_left_out(model: Any, tokenizer: Any) -> None:
    encoded = [[8 + n, 9, 10] for n in range(8)]
    whole = complete_tokens(model, tokenizer, encoded, [5] * 8, batch_size=4)
    seen: list[int] = []
    part = complete_tokens(
        model, tokenizer, encoded, [5] * 8, batch_size=4, wanted=[n == 5 for n in range(8)],
        each=lambda index, _: seen.append(index),
    )  # fmt: skip
    assert part == [[]] * 4 + whole[4:]
    assert sorted(seen) == [4, 5, 6, 7]
