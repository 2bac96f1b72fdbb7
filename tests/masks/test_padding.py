"""Models that see the padding before a sequence: found out once, and given one sequence at a time."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers

from resafe.checkpoints import load_model
from resafe.deltas import task_vector
from resafe.errors import InputError
from resafe.masks import Encoded, MaskSettings, MaskTrainer, TrainSettings, answer_log_probabilities, install_masks
from resafe.masks.batches import Item
from resafe.masks.losses import UNPADDED, answer_logits
from resafe.masks.padding import check_padding
from resafe.masks.processes import Processes
from tests.tiny import saved_pair

TEXTS = [
    Encoded((5, 9, 10), (20, 21, 22, 3)),
    Encoded((5,), (33,)),
    Encoded(tuple(range(30, 49)), (7, 8)),
]
ITEMS = [
    Item(row, side, text, None) for row, (side, text) in enumerate(zip(("safety", "task", "task"), TEXTS, strict=True))
]
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3}
KINDS = {
    "Rwkv": {"context_length": 64},
    "RecurrentGemma": {"num_attention_heads": 4, "intermediate_size": 64, "lru_width": 32, "attention_window_size": 64},
}


def masked(path, kind):
    """A model, and the same after a training of all weights, behind a mask of ones that learns; and the tuned one."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES, **KINDS[kind]))
    base, tuned = saved_pair(model, path, base=0.3, tuned=0.05)
    found, vector = load_model(base), task_vector(tuned, base)
    plan = MaskSettings(sampling="direct", initial=1.0)
    return (
        found,
        install_masks(found, [vector], plan, seed=0, combine=lambda n, d: d[0], linear=True),
        load_model(tuned),
    )


def by_hand(model, texts):
    sums = []
    for text in texts:
        with torch.no_grad():
            ids = torch.tensor([text.prompt + text.answer])
            scores = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        start = len(text.prompt) - 1
        sums.append(sum(float(scores[start + at, token]) for at, token in enumerate(text.answer)))
    return sums


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_go_one_at_a_time_through_a_model_that_ignores_the_attention_mask(tmp_path, kind):
    model, values, tuned = masked(tmp_path, kind)
    wanted = by_hand(tuned, TEXTS)
    with torch.no_grad():
        padded = answer_log_probabilities(model, TEXTS, 1, pass_cost=1000)[0].tolist()
    assert max(abs(one - other) for one, other in zip(padded, wanted, strict=True)) > 0.1  # the fault
    state = torch.get_rng_state()
    settings = TrainSettings(batch_size=3, shares={"safety": 1, "task": 2}, steps=1, warmup_steps=0)
    with pytest.warns(UserWarning, match=f"{kind}ForCausalLM computes padded sequences otherwise"):
        trainer = MaskTrainer(model, values, ITEMS, settings, pad_id=1)
    assert torch.equal(torch.get_rng_state(), state)
    found, lengths = answer_log_probabilities(model, TEXTS, 1, pass_cost=1000)
    assert found.tolist() == pytest.approx(wanted, abs=1e-4) and lengths.tolist() == [4, 1, 2]
    _, metrics = trainer.loss(ITEMS)
    assert metrics["nll/safety"] == pytest.approx(-wanted[0] / 4, abs=1e-4)
    assert metrics["nll/task"] == pytest.approx(-(wanted[1] + wanted[2] / 2) / 2, abs=1e-4)
    _, tokens, rows = answer_logits(model, TEXTS, 1)
    assert tokens.tolist() == [20, 21, 22, 3, 33, 7, 8] and rows.tolist() == [0, 0, 0, 0, 1, 2, 2]
    found.sum().backward()
    assert any(bool(value.grad is not None and value.grad.any()) for value in values.values.values())
    before = trainer.identity()
    setattr(model, UNPADDED, False)
    assert trainer.identity() != before  # a training from before does not go on here
    setattr(model, UNPADDED, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        check_padding(model, values, ITEMS, 1)
    delattr(model, UNPADDED)
    together = Processes(0, 2)
    object.__setattr__(together, "agree", lambda flag: flag)
    with pytest.raises(InputError, match="several processes share batches"):
        check_padding(model, values, ITEMS, 1, together)


def test_a_model_of_attention_goes_on_as_it_did(lab):
    model = lab.plain()
    vector = task_vector(lab.open("full_all"), lab.open("base"))
    values = install_masks(model, [vector], MaskSettings(), seed=0, combine=lambda n, d: d[0], linear=True)
    model.model.layers[0].train()
    before = answer_log_probabilities(model, TEXTS, 1, pass_cost=1000)[0]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_padding(model, values, ITEMS, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert getattr(model, UNPADDED) is False and model.model.layers[0].training and not model.training
    assert torch.equal(answer_log_probabilities(model, TEXTS, 1, pass_cost=1000)[0], before)
