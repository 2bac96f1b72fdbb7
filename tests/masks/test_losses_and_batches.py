"""Log-probabilities of ragged batches, preference losses by hand, and the order of batches."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import pairwise
from random import Random
from types import SimpleNamespace

import pytest
import torch

from resafe.errors import InputError
from resafe.masks import PRESETS, Encoded, TrainSettings, answer_log_probabilities, encode_items, preference_loss
from resafe.masks.batches import Batches, Item
from resafe.masks.losses import length_groups, token_divergence
from resafe.masks.pairs import attention_window, pair_log_probabilities, shares_prompts
from resafe.masks.train import batches_of
from tests.evals.tiny import tiny_model, tiny_tokenizer, windowed
from tests.tiny import KEEP, PAIRS


def test_ragged_batch_against_one_at_a_time():
    model = tiny_model(initializer_range=0.2)
    batch = [
        Encoded((5, 9, 10), (20, 21, 22, 3)),
        Encoded((5,), (33,)),
        Encoded(tuple(range(30, 49)), (7, 8)),
    ]
    sums, lengths = answer_log_probabilities(model, batch, 1)
    assert lengths.tolist() == [4, 1, 2]
    for found, item in zip(sums.tolist(), batch, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([item.prompt + item.answer])).logits[0].log_softmax(-1)
        wanted = sum(float(scores[len(item.prompt) + at - 1, token]) for at, token in enumerate(item.answer))
        assert found == pytest.approx(wanted, abs=1e-4)
    other_padding, _ = answer_log_probabilities(model, batch, 60)
    torch.testing.assert_close(sums, other_padding)


PAIRED = [
    (Encoded((5, 9, 10), (20, 21, 22, 3)), Encoded((5, 9, 10), (44,))),
    (Encoded((5,), (33,)), Encoded((5,), (50, 51, 52, 53, 54, 55))),
    (Encoded(tuple(range(30, 49)), (7, 8)), Encoded(tuple(range(30, 49)), (7, 9, 60))),
]


@pytest.mark.parametrize("pass_cost", [0, 1000])
def test_a_shared_prompt_changes_nothing_but_the_cost(pass_cost):
    model = tiny_model(initializer_range=0.2)
    wanted, _ = answer_log_probabilities(model, [answer for pair in PAIRED for answer in pair], 1)
    found = pair_log_probabilities(model, PAIRED, 1, pass_cost)
    torch.testing.assert_close(found.flatten(), wanted, rtol=1e-5, atol=1e-5)
    assert shares_prompts(model, PAIRED, 1)
    model.zero_grad()
    found.sum().backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    answer_log_probabilities(model, [answer for pair in PAIRED for answer in pair], 1)[0].sum().backward()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, gradient, rtol=1e-4, atol=1e-5)


def test_a_model_with_state_along_the_sequence_does_not_share_prompts():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    assert not shares_prompts(model, PAIRED, 1)


def test_a_window_shorter_than_the_longest_pair_keeps_prompts_apart(monkeypatch):
    """Pairs of 8, 8 and 24 tokens: a mask of whole positions takes the window's place, which only the last shows."""
    wanted = answer_log_probabilities(windowed(16), list(PAIRED[2]), 1)[0]
    assert float((pair_log_probabilities(windowed(16), PAIRED[2:], 1)[0] - wanted).abs().max()) > 0.1
    assert shares_prompts(windowed(16), PAIRED[:2], 1) and not shares_prompts(windowed(16), PAIRED, 1)
    longest = max(len(answer) for answer in PAIRED[2])  # a prompt with one answer: the other's place does not count
    assert longest < 24 and shares_prompts(windowed(longest), PAIRED, 1)
    assert not shares_prompts(windowed(longest - 1), PAIRED, 1)
    torch.testing.assert_close(
        pair_log_probabilities(windowed(longest), PAIRED, 1).flatten(),
        answer_log_probabilities(windowed(longest), [answer for pair in PAIRED for answer in pair], 1)[0],
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    monkeypatch.setattr("resafe.masks.pairs.attention_window", lambda config: None)
    assert not shares_prompts(windowed(16), PAIRED, 1)  # the longest pair tells where no configuration does


def test_windows_of_configurations():
    from transformers import Gemma3Config, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

    assert attention_window(LlamaConfig()) is attention_window(GPT2Config()) is attention_window(None) is None
    assert attention_window(MistralConfig(sliding_window=12)) == 12
    assert attention_window(MistralConfig(sliding_window=None)) is None
    assert attention_window(Qwen2Config(sliding_window=12)) is None
    used = {"use_sliding_window": True, "sliding_window": 12, "num_hidden_layers": 2}
    assert attention_window(Qwen2Config(**used, max_window_layers=1)) == 12
    assert attention_window(Qwen2Config(**used, max_window_layers=2)) is None  # of no layer
    inner = {"sliding_window": 12, "num_hidden_layers": 2}
    assert attention_window(Gemma3Config(text_config=inner)) == 12
    chunks = SimpleNamespace(attention_chunk_size=9, layer_types=["chunked_attention", "full_attention"])
    assert attention_window(chunks) == 9
    assert attention_window(SimpleNamespace(attention_chunk_size=9, layer_types=["full_attention"])) is None


def test_groups_of_a_batch_change_nothing_but_the_cost():
    model = tiny_model(initializer_range=0.2)
    batch = [Encoded(tuple(range(30, 30 + n)), (20, 21)[: 1 + n % 2]) for n in (3, 18, 4, 17, 3)]
    together, lengths = answer_log_probabilities(model, batch, 1, pass_cost=1000)
    apart, _ = answer_log_probabilities(model, batch, 1, pass_cost=0)
    torch.testing.assert_close(apart, together)
    assert lengths.tolist() == [2, 1, 1, 2, 2]


def test_length_groups_by_hand():
    lengths = [10, 90, 12, 80, 10]
    assert length_groups(lengths, 20) == [[0, 2, 4], [1, 3]]  # 3·12 + 2·90 + 2·20 = 256
    assert length_groups(lengths, 300) == [[0, 1, 2, 3, 4]]  # 450 + 300, against 816 for two passes
    assert length_groups(lengths, 0) == [[0, 4], [2], [3], [1]]  # equal lengths together, nothing padded
    assert length_groups([7], 64) == [[0]]


def test_length_groups_against_every_partition():
    random = Random(0)
    for _ in range(20):
        lengths = sorted(random.randint(1, 60) for _ in range(7))
        cuts = [[end for end in range(1, 7) if bits >> end & 1] for bits in range(0, 128, 2)]
        costs = []
        for cut in cuts:
            edges = [0, *cut, 7]
            parts = [lengths[a:b] for a, b in pairwise(edges)]
            costs.append(sum(len(part) * part[-1] + 30 for part in parts))
        groups = length_groups(lengths, 30)
        assert sorted(row for group in groups for row in group) == list(range(7))
        assert sum(len(g) * max(lengths[row] for row in g) + 30 for g in groups) == min(costs)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("sigmoid", lambda d, beta: -math.log(1 / (1 + math.exp(-beta * d)))),
        ("ipo", lambda d, beta: (d - 1 / (2 * beta)) ** 2),
        ("hinge", lambda d, beta: max(0.0, 1 - beta * d)),
    ],
)
def test_preference_losses_by_hand(name, formula):
    values = torch.tensor([[-5.0, -9.0, -6.0, -7.0], [-30.0, -3.0, -12.0, -14.0]])
    losses, margins = preference_loss(*values.T, 0.3, name)
    for loss, margin, (c, r, rc, rr) in zip(losses.tolist(), margins.tolist(), values.tolist(), strict=True):
        difference = (c - rc) - (r - rr)
        assert loss == pytest.approx(formula(difference, 0.3), rel=1e-5)
        assert margin == pytest.approx(0.3 * difference, rel=1e-5)


def logistic(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("name", "formula"),  # w, x: log-ratios of the chosen and the rejected answer; e: share of wrong labels
    [
        (
            "robust",
            lambda w, x, b, e: (
                (-(1 - e) * math.log(logistic(b * (w - x))) + e * math.log(logistic(b * (x - w)))) / (1 - 2 * e)
            ),
        ),
        (
            "exo_pair",
            lambda w, x, b, e: (
                logistic(b * (w - x)) * math.log(logistic(b * (w - x)) / (1 - e))
                + logistic(b * (x - w)) * math.log(logistic(b * (x - w)) / e)
            ),
        ),
        (
            "nca_pair",
            lambda w, x, b, e: (
                -math.log(logistic(b * w)) - 0.5 * math.log(logistic(-b * w)) - 0.5 * math.log(logistic(-b * x))
            ),
        ),
        ("sppo_hard", lambda w, x, b, e: (w - 0.5 / b) ** 2 + (x + 0.5 / b) ** 2),
        ("apo_zero", lambda w, x, b, e: 1 - logistic(b * w) + logistic(b * x)),
        ("apo_down", lambda w, x, b, e: logistic(b * w) + 1 - logistic(b * (w - x))),
    ],
)
def test_more_preference_losses_by_hand(name, formula):
    values = torch.tensor([[-5.0, -9.0, -6.0, -7.0], [-30.0, -3.0, -12.0, -14.0]])
    losses, margins = preference_loss(*values.T, 0.3, name, 0.1)
    for loss, margin, (c, r, rc, rr) in zip(losses.tolist(), margins.tolist(), values.tolist(), strict=True):
        assert loss == pytest.approx(formula(c - rc, r - rr, 0.3, 0.1), rel=1e-5)
        assert margin == pytest.approx(0.3 * (c - rc - r + rr), rel=1e-5)


def test_discopop_by_hand():
    """At a margin of 0 half of each: (log 2 + 1)/2; far above it e^−margin, far below −margin, and no 0 · ∞."""
    for margin, wanted in ((0.0, (math.log(2) + 1) / 2), (3.0, math.exp(-3)), (-200.0, 200.0), (-2.0, 2.126928)):
        reward = torch.tensor([margin / 0.5], requires_grad=True)
        losses, _ = preference_loss(reward, *torch.zeros(3, 1), 0.5, "discopop")
        assert losses.item() == pytest.approx(wanted, rel=1e-5)
        losses.sum().backward()
        assert reward.grad.isfinite().all()
    losses, _ = preference_loss(torch.tensor([0.05]), *torch.zeros(3, 1), 1.0, "discopop")  # weights σ(∓1)
    wanted = -math.log(logistic(0.05)) * logistic(-1) + math.exp(-0.05) * logistic(1)
    assert losses.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "differences"),
    [
        ("aot", [1.0, 0.0]),  # chosen − rejected: 4, 2, sorted 2, 4; of the reference 1, 4
        ("aot_unpaired", [0.0, 1.0]),  # chosen over the reference: 2, −1, sorted −1, 2; rejected −1, 1
    ],
)
def test_quantiles_of_a_batch_by_hand(name, differences):
    values = torch.tensor([[-4.0, -8.0, -6.0, -7.0], [-13.0, -15.0, -12.0, -16.0]])
    losses, margins = preference_loss(*values.T, 0.5, name, 0.1)
    wanted = [-0.9 * math.log(logistic(0.5 * d)) - 0.1 * math.log(logistic(-0.5 * d)) for d in differences]
    assert losses.tolist() == pytest.approx(wanted, rel=1e-5)
    assert margins.tolist() == pytest.approx([1.5, -1.0])  # of pairs, not of ranks
    apart = torch.cat([preference_loss(*row[:, None], 0.5, name, 0.1)[0] for row in values])
    single = torch.cat([preference_loss(*row[:, None], 0.5, "sigmoid")[0] for row in values])
    assert float((apart.mean() - losses.mean()).abs()) > 0.05  # why a batch is not cut
    torch.testing.assert_close(torch.cat([preference_loss(*row[:, None], 0.5, name)[0] for row in values]), single)


def test_label_smoothing_has_its_range():
    assert TrainSettings(loss="exo_pair", label_smoothing=0.1).label_smoothing == 0.1
    for wrong in ({"loss": "exo_pair"}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}):
        with pytest.raises(InputError, match="label_smoothing is"):
            TrainSettings(**wrong)


def test_divergence_is_that_of_torch_distributions():
    torch.manual_seed(0)
    one, two = torch.randn(5, 7), torch.randn(5, 7)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=one), torch.distributions.Categorical(logits=two)
    )
    torch.testing.assert_close(token_divergence(one, two), wanted)
    assert token_divergence(one, one).abs().max() == 0


def test_sft_is_no_preference_loss():
    with pytest.raises(ValueError, match="no preference loss"):
        preference_loss(*torch.zeros(4, 1), 0.1, "sft")


def items(counts):
    token = Encoded((1,), (2,))
    sides = [side for side, count in counts.items() for _ in range(count)]
    return [Item(n, side, token, None) for n, side in enumerate(sides)]


def test_every_batch_has_the_same_composition():
    batches = Batches(
        items({"safety": 9, "harmless": 5, "task": 4}), 8, {"safety": 0.4, "harmless": 0.4, "task": 0.2}, 0
    )
    assert batches.counts == {"safety": 3, "harmless": 3, "task": 2}  # 3.2, 3.2, 1.6: the largest remainder is task's
    for step in range(20):
        sides = [item.side for item in batches.at(step)]
        assert {side: sides.count(side) for side in set(sides)} == batches.counts
    missing = Batches(items({"safety": 9}), 8, {"safety": 0.4, "harmless": 0.6}, 0)
    assert missing.counts == {"safety": 8}


@pytest.mark.parametrize(
    ("preset", "size", "counts"),
    [
        ("default", 3, [1, 1, 1]),  # .75, 1.5, .75
        ("default", 4, [1, 2, 1]),
        ("labels", 4, [1, 2, 1]),  # 1, 2.4, .6
        ("labels", 16, [4, 10, 2]),  # 4, 9.6, 2.4
        ("paper", 1, [1]),
    ],
)
def test_the_presets_batches(preset, size, counts):
    made = items({"safety": 9, "harmless": 9, "task": 9})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(Batches(made, size, PRESETS[preset].training.shares, 0).counts.values()) == counts


def test_batches_too_small_for_a_side():
    """Without refusals nothing is learnt of safety; without a task a trial of a step still runs, and is told so."""
    made, shares = items({"safety": 9, "harmless": 9, "task": 9}), PRESETS["default"].training.shares
    with pytest.raises(InputError, match="batches of 1 have no place for safety and task.*\n.*batch_size to 3 or more"):
        Batches(made, 1, shares, 0)
    with pytest.warns(UserWarning, match="batches of 2 have no place for task, .*; from batch_size 3 on they have"):
        assert Batches(made, 2, shares, 0).counts == {"safety": 1, "harmless": 1, "task": 0}
    with pytest.warns(UserWarning, match="batches of 3 have no place for task, .*; from batch_size 4 on they have"):
        assert Batches(made, 3, PRESETS["labels"].training.shares, 0).counts == {"safety": 1, "harmless": 2, "task": 0}
    with pytest.raises(InputError, match="no side 'refusals'.*\n.*safety, harmless, task"):
        Batches(made, 8, {"refusals": 1.0}, 0)
    with pytest.raises(InputError, match="no side has both a share and items, of which there are some for safety"):
        Batches(items({"safety": 9}), 8, {"task": 1.0, "safety": 0.0}, 0)


def test_a_preference_loss_without_a_pair_is_refused():
    """It would be the mean over no pairs: NaN in every logit."""
    made = encode_items(tiny_tokenizer(), None, PAIRS, KEEP)
    settings = TrainSettings(loss="sigmoid", batch_size=4, shares={"task": 1.0})
    with pytest.raises(InputError, match="loss 'sigmoid' compares .* batches of {'task': 4}"):
        batches_of(made, settings)
    assert batches_of(made, replace(settings, loss="sft")).counts == {"task": 4}
    assert batches_of(made, replace(settings, shares={"task": 1.0, "harmless": 1.0})).counts == {
        "task": 2,
        "harmless": 2,
    }


def test_batches_are_a_function_of_the_step():
    made = items({"safety": 10, "task": 6})
    first, second = (Batches(made, 5, {"safety": 0.8, "task": 0.2}, 1) for _ in range(2))
    forwards = [first.at(step) for step in range(12)]
    assert forwards == [second.at(step) for step in reversed(range(12))][::-1]
    assert forwards != [Batches(made, 5, {"safety": 0.8, "task": 0.2}, 2).at(step) for step in range(12)]


def test_each_item_appears_once_an_epoch():
    batches = Batches(items({"safety": 12, "task": 6}), 6, {"safety": 2, "task": 1}, 0)
    assert batches.counts == {"safety": 4, "task": 2}
    epochs = [[item.index for step in range(3 * e, 3 * e + 3) for item in batches.at(step)] for e in range(2)]
    assert all(sorted(epoch) == list(range(18)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_items_carry_the_template():
    tokenizer = tiny_tokenizer()
    made = encode_items(tokenizer, "", PAIRS, KEEP)
    assert [item.side for item in made] == ["safety"] * 6 + ["harmless"] * 4 + ["task"] * 3
    assert [item.index for item in made] == list(range(13))
    text = tokenizer.decode(made[0].chosen.prompt + made[0].chosen.answer)
    assert text.split() == "<system> <end> <user> w0 w7 w9 <end> <bot> w20 <end>".split()
    assert made[0].rejected.prompt == made[0].chosen.prompt
    assert made[-1].rejected is None
    with pytest.raises(InputError, match="no safety pairs"):
        encode_items(tokenizer, None, [pair for pair in PAIRS if pair.side != "safety"], KEEP)
