"""Methods that take gradients: scores against plain autograd, SOMF and further training end to end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resafe.checkpoints import open_checkpoint
from resafe.deltas import task_vector
from resafe.engine import Input, Request, build_plan, execute
from resafe.errors import InputError, ResafeError
from resafe.fusion import Fusion
from resafe.masks import Mask, MaskSettings
from resafe.masks.concrete import logits_shape
from resafe.masks.modules import MaskedWeight
from resafe.realign import REALIGN, Problem, learn
from resafe.realign.mask_family import mask_family
from resafe.realign.scores import (
    agreed,
    encoded_items,
    first_of_each_side,
    mask_gradients,
    masked_model,
    nth_highest,
    removal_mask,
    second_order,
    turned,
    with_head_size,
)
from resafe.realign.warm import WarmStart, warm_logits
from resafe.realign.write import write_realigned
from resafe.settings import named_values
from tests.realign.test_methods import family, problem
from tests.tiny import KEEP, PAIRS, Source, logits


def learnable(lab, work=None, tuned=("tuned",), aligned="safe", name="base"):
    return problem(lab, tuned, aligned, pairs=PAIRS, keep=KEEP, source=Source(lab, name), work=work)


def test_scores_are_the_task_vector_times_the_weights_gradient(lab):
    of = learnable(lab)
    model, values = masked_model(of, MaskSettings(sampling="direct", initial=1.0), 0)
    items, pad = encoded_items(of)
    scales = {"safety": 1.0, "harmless": 0.5, "task": 2.0}
    seen = []
    scores = mask_gradients(model, values, items, scales, pad, lambda *report: seen.append(report[:2]))
    assert seen == [(1, 1)]

    plain = lab.adapted("tuned")
    factors = {n.replace(".default", ""): p for n, p in plain.named_parameters() if "lora_" in n}
    for parameter in factors.values():
        parameter.requires_grad_(True)
    loss = torch.zeros(())
    for item in items:
        ids = torch.tensor([item.chosen.prompt + item.chosen.answer])
        start = len(item.chosen.prompt)
        picked = plain(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        nll = -picked.gather(1, ids[0, start:, None]).mean()
        loss = loss + scales[item.side] * nll / sum(other.side == item.side for other in items)
    loss.backward()
    (vector,) = of.vectors
    for name in of.names:
        torch.testing.assert_close(scores[name], vector.delta(name) * factors[name].grad, rtol=1e-3, atol=1e-5)
    assert max(float(score.abs().max()) for score in scores.values()) > 1e-3


def test_removal_mask_takes_the_top_share_of_positive_scores():
    torch.manual_seed(0)
    scores = {"a": torch.randn(30, 10), "b": torch.randn(100)}
    masks = removal_mask(scores, 0.1)
    flat = torch.cat([scores["a"].flatten(), scores["b"]])
    removed = torch.cat([masks["a"].flatten(), masks["b"]]) == 0
    assert set(removed.nonzero().flatten().tolist()) == set(flat.topk(40).indices.tolist())
    every = removal_mask(scores, 1.0)
    assert all(torch.equal(every[key] == 0, scores[key] > 0) for key in scores)  # never a harmful removal
    assert all(bool((mask == 1).all()) for mask in removal_mask(scores, 0.0).values())


def test_entries_that_tie_at_the_threshold_make_the_share_and_no_more():
    """As a small change stored in bfloat16 has them: few magnitudes, each with many entries."""
    torch.manual_seed(0)
    scores = {"a": torch.randint(0, 4, (30, 10)).float(), "b": torch.randint(0, 4, (100,)).float()}
    flat = torch.cat([scores["a"].flatten(), scores["b"]])
    threes = int((flat == 3).sum())
    for share in (0.01, 0.05, 0.2, 0.4):
        masks = removal_mask(scores, share)
        removed = torch.cat([masks["a"].flatten(), masks["b"]]) == 0
        assert int(removed.sum()) == round(share * 400)
        assert float(flat[removed].min()) == (3.0 if share * 400 <= threes else 2.0)
        assert masks["a"].shape == (30, 10) and masks["a"].dtype == torch.float32
        spread = int((masks["a"] == 0).sum()) / float(removed.sum())  # over the tensors as the entries are
        assert abs(spread - 0.75) < 0.26
    assert int((flat > 0).sum()) == sum(int((mask == 0).sum()) for mask in removal_mask(scores, 0.9).values())
    four = removal_mask({"a": torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0, 0.0, 3.0, 2.0])}, 0.5)["a"]
    assert four.tolist() == [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]  # the 3, and three of five 2s
    before = {"a": torch.tensor([0.0, 0.0, 0.0, 1.0])}
    assert removal_mask({"a": torch.ones(4)}, 0.5, before)["a"].tolist() == before["a"].tolist()  # nothing comes back


@pytest.mark.parametrize("count", [1, 7, 300, 400, 1000])
def test_the_nth_highest_is_that_of_sorting(count):
    """Ties, zeros and negative numbers included; it is never below the smallest positive number."""
    torch.manual_seed(1)
    parts = [torch.randn(40, 20) * 1e-3, torch.full((100,), 2.5), torch.zeros(100), torch.tensor([torch.inf])]
    wanted = torch.cat([part.flatten() for part in parts]).sort(descending=True).values[count - 1]
    assert nth_highest(parts, count) == max(float(wanted), torch.finfo(torch.float32).tiny)
    assert nth_highest([torch.tensor([torch.inf, 1.0])], 1) == torch.inf


def test_warm_logits():
    found = warm_logits({"a": torch.tensor([5.0, -1.0, 2.0, 1.0])}, WarmStart(share=0.5, removed=-1, kept=3))
    assert found["a"].tolist() == [-1, 3, -1, 3]


def test_first_of_each_side(lab):
    items, _ = encoded_items(learnable(lab))
    assert [item.index for item in first_of_each_side(items, 2)] == [0, 1, 6, 7, 10, 11]


def test_an_entry_that_another_side_needs_is_not_removed():
    safety, harmless, task = (
        torch.tensor(row) for row in ([3.0, 2.0, 1.0, -1.0], [0.0, -0.1, 5.0, 1.0], [1.0, 1, 0, 1])
    )
    assert agreed(safety, harmless, task).tolist() == [3.0, 0.0, 1.0, -1.0]


def test_selector_removes_what_its_scores_say(lab):
    of = learnable(lab)
    found = family("selector", of, shares=[0.1], examples=2)
    total = sum(of.vectors[0].delta(name).numel() for name in of.names)
    assert found.facts["entries"] == total
    changed = sum(int((found.at(0.1)(n) != of.vectors[0].aligned(n) + of.vectors[0].delta(n)).sum()) for n in of.names)
    assert 0.05 * total < changed <= round(0.1 * total)


def _removed(of, found, share):
    same = {name: of.vectors[0].aligned(name) + of.vectors[0].delta(name) for name in of.names}
    return torch.cat([(found.at(share)(name) != same[name]).flatten() for name in of.names])


def test_selector_path_goes_on_from_the_mask_before(lab):
    of = learnable(lab)
    path, once = (family("selector", of, shares=[0.1, 0.02], examples=2, path=path) for path in (True, False))
    assert path.strengths == once.strengths == (0.02, 0.1)
    weak, strong = (_removed(of, path, share) for share in path.strengths)
    assert bool(strong[weak].all())  # what is removed stays removed
    assert int(strong.sum()) > int(weak.sum())
    assert torch.equal(weak, _removed(of, once, 0.02))  # the first scores are the same
    assert not torch.equal(strong, _removed(of, once, 0.1))  # the second are taken elsewhere, on other examples


def test_selector_scales_what_it_would_remove(lab):
    of = learnable(lab)
    half, gone = (family("selector", of, shares=[0.1], examples=2, scale=scale) for scale in (0.5, 0.0))
    for name in of.names:
        aligned, delta = of.vectors[0].aligned(name), of.vectors[0].delta(name)
        picked = gone.at(0.1)(name) != aligned + delta
        wanted = aligned + torch.where(picked, 128 / 255, 1.0) * delta  # a mask file holds multiples of 1/255
        torch.testing.assert_close(half.at(0.1)(name), wanted, rtol=0, atol=1e-7)
    with pytest.raises(InputError, match="no part that is left"):
        family("selector", of, scale=1.0)


def test_a_path_of_scaled_entries_takes_its_scores_there(lab):
    """What is scaled stays so and counts once, and the next scores are taken at the model it makes."""
    of = learnable(lab)
    halves = family("selector", of, shares=[0.02, 0.1], examples=2, scale=0.5)
    weak, strong = (_removed(of, halves, share) for share in halves.strengths)
    assert bool(strong[weak].all()) and 0 < int(weak.sum()) < int(strong.sum()) <= round(0.1 * len(strong))
    for name in of.names:
        left = (halves.at(0.1)(name) - of.vectors[0].aligned(name)) / of.vectors[0].delta(name)
        assert float(torch.minimum((left - 1).abs(), (left - 128 / 255).abs()).max()) < 1e-2
    gone = family("selector", of, shares=[0.02, 0.1], examples=2)
    assert torch.equal(weak, _removed(of, gone, 0.02)) and not torch.equal(strong, _removed(of, gone, 0.1))


def test_a_share_off_the_selector_s_grid_goes_on_from_the_one_below(lab):
    of = learnable(lab)
    settings = {"examples": 2, "answer_tokens": None}
    wide = family("selector", of, shares=[0.02, 0.1, 0.2], **settings)
    narrow = family("selector", of, shares=[0.02, 0.2], **settings)
    assert torch.equal(_removed(of, narrow, 0.1), _removed(of, wide, 0.1))
    assert not torch.equal(_removed(of, narrow, 0.1), _removed(of, narrow, 0.2))
    with pytest.raises(InputError, match="1.5 is no share"):
        narrow.at(1.5)


def test_a_score_that_is_no_number_removes_nothing():
    with pytest.raises(ResafeError, match="'a' hold NaN"):
        removal_mask({"a": torch.tensor([1.0, torch.nan, 2.0]), "b": torch.ones(2)}, 0.25)


def test_removal_mask_fills_up_what_is_removed_already():
    scores = {"a": torch.tensor([5.0, 4.0, -1.0, 3.0]), "b": torch.tensor([1.0, 2.0])}
    before = {"a": torch.tensor([1.0, 1.0, 0.0, 1.0]), "b": torch.ones(2)}
    half = removal_mask(scores, 0.5, before)  # three of six: the one that is gone, and the two best of the rest
    assert {key: mask.tolist() for key, mask in half.items()} == {"a": [0.0, 0.0, 0.0, 1.0], "b": [1.0, 1.0]}


def test_items_are_turned_side_by_side(lab):
    items, _ = encoded_items(learnable(lab))
    safety = [item.index for item in items if item.side == "safety"]
    assert [item.index for item in turned(items, 2) if item.side == "safety"] == safety[2:] + safety[:2]
    assert sorted(item.index for item in turned(items, 5)) == sorted(item.index for item in items)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 3, "batch_size": 5},
        {"steps": 3, "batch_size": 5, "warm_share": 0, "granularity": "rank", "export": "top_k", "rescale": "norm"},
        {"preset": "paper", "steps": 3, "batch_size": 2},
        {"steps": 3, "batch_size": 5, "granularity": "layer", "task_divergence": 1.0},
        {
            "preset": "labels",
            "steps": 3,
            "batch_size": 5,
            "granularity": "head",
            "loss": "robust",
            "label_smoothing": 0.1,
        },
    ],
    ids=["default", "rank", "paper", "layer", "labels by head"],
)
def test_somf_writes_an_adapter(lab, tmp_path, settings):
    of = learnable(lab, tmp_path / "work")
    found = family("somf", of, **settings)
    out = write_realigned(tmp_path / "out", of.vectors, found.at(1.0), lab.open("tuned"), "")
    changed = logits(lab.adapted(out))
    assert bool(changed.isfinite().all())
    assert not torch.allclose(changed, logits(lab.adapted("tuned")), atol=1e-3)
    if settings.get("granularity") == "rank":
        assert found.mask.keep_rate == 0.5
    if settings.get("granularity") == "layer":
        assert found.mask.settings.granularity == "tensor" and set(found.mask.values) == set(of.names)
        for layer in (0, 1):
            assert len({float(value) for name, value in found.mask.values.items() if f".layers.{layer}." in name}) == 1
    if settings.get("granularity") == "head":
        assert found.mask.settings.head_size == 8
    assert len(found.strengths) == (1 if "rescale" in settings or settings.get("preset") == "paper" else 3)
    found.mask.save(tmp_path / "mask")
    read = family("somf", problem(lab), mask=tmp_path / "mask")
    for name in of.names:
        assert torch.equal(read.at(1.0)(name), found.at(1.0)(name))
    assert Mask.load(tmp_path / "mask").provenance["training"]["steps"] == 3
    provenance = Mask.load(tmp_path / "mask").provenance
    assert provenance["aligned"] == lab.open("safe").digest and provenance["tuned"] == [lab.open("tuned").digest]
    # The mask is over what the tuned adapter added to the safe one; over all of its factors it would be another model.
    lab.open("base").digest  # noqa: B018
    tuned = Input(f"{lab.root / 'base'}+{lab.root / 'tuned'}", "tuned")
    request = Request(str(lab.root / "base"), (tuned,), tmp_path / "f", "mask", {"file": str(tmp_path / "mask")})
    with pytest.raises(InputError, match="made for another base"):
        build_plan(request, lab.root / "cache")


@pytest.mark.parametrize("kind", ["GPT2", "GPTJ", "XGLM"])
def test_the_width_of_heads_is_found_under_every_name(tmp_path, kind):
    import transformers

    names = {
        "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 64},
        "GPTJ": {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 64, "rotary_dim": 4},
        "XGLM": {"d_model": 32, "attention_heads": 4, "num_layers": 1, "ffn_dim": 32},
    }
    config = getattr(transformers, f"{kind}Config")(vocab_size=97, **names[kind])
    for seed, name in enumerate(("aligned", "tuned")):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(config)
        model.save_pretrained(tmp_path / name)
    aligned, tuned = (open_checkpoint(tmp_path / name, cache=tmp_path / "cache") for name in ("aligned", "tuned"))
    of = Problem([task_vector(tuned, aligned)])
    if kind == "GPT2":  # its projections in are one tensor, with heads in its columns
        for given in (MaskSettings("head"), MaskSettings("head", head_size=8)):
            with pytest.raises(InputError, match="no tensor of the task vectors .*\n.*granularity row or entry"):
                with_head_size(given, of)
    else:
        settings = with_head_size(MaskSettings("head"), of)
        assert settings.head_size == 8
        shapes = {name: logits_shape(name, of.vectors[0].shape(name), settings) for name in of.names}
        of_heads = [shape for name, shape in shapes.items() if name.endswith(("q_proj.weight", "out_proj.weight"))]
        assert sorted(of_heads) == [(1, 4), (4, 1)]
    aligned.config.update(dict.fromkeys(names[kind], None))
    with pytest.raises(InputError, match="attention heads is not known.*\n.*granularity row or column"):
        with_head_size(MaskSettings("head"), of)


def test_batches_that_cannot_be_are_told_before_a_model_is_loaded(lab):
    of = replace(learnable(lab), source=Source(lab, "no such model"))
    with pytest.raises(InputError, match="batch_size to 3 or more"):
        family("somf", of, steps=1, batch_size=1)
    with pytest.raises(InputError, match="compares the answers of pairs"):
        family("somf", of, steps=1, loss="ipo", shares={"task": 1.0})


@pytest.mark.parametrize(
    ("method", "given", "wanted"),
    [("somf", {}, 6), ("somf", {"answer_tokens": "all"}, None), ("somf", {"answer_tokens": "3"}, 3),
     ("somf", {"preset": "paper"}, None), ("selector", {}, 4), ("selector", {"answer_tokens": "all"}, None)],
)  # fmt: skip
def test_all_tokens_of_the_answers_can_be_asked_for(lab, monkeypatch, method, given, wanted):
    seen = []

    def encoded(problem, answer_tokens=None):
        seen.append(answer_tokens)
        raise ResafeError("seen", "")

    for place in ("learn", "selector"):
        monkeypatch.setattr(f"resafe.realign.{place}.encoded_items", encoded)
    settings = named_values([f"{name}={value}" for name, value in given.items()], "--set")
    with pytest.raises(ResafeError, match="seen"):
        family(method, learnable(lab), **REALIGN.get(method).check(settings))
    assert seen == [wanted]
    with pytest.raises(InputError, match="'answer_tokens' = 'some'"):
        REALIGN.get(method).check({"answer_tokens": "some"})


def test_warm_start_is_where_training_begins(lab, tmp_path):
    of = learnable(lab, tmp_path)
    found = family("somf", of, steps=0, warm_share=0.1, warm_removed=-2.0, warm_kept=4.0)
    low, high = torch.sigmoid(torch.tensor([-2.0, 4.0])).mul(255).round().div(255).tolist()
    entries = torch.cat([value.flatten() for value in found.mask.values.values()])
    assert sorted(set(entries.tolist())) == pytest.approx([low, high])
    assert float((entries < 0.5).float().mean()) == pytest.approx(0.1, abs=1 / len(entries))
    before = (tmp_path / "scores.safetensors").stat().st_mtime_ns
    family("somf", of, steps=0, warm_share=0.2)
    assert (tmp_path / "scores.safetensors").stat().st_mtime_ns == before  # the same scores, cut elsewhere
    other = family("somf", of, steps=0, granularity="row", warm_share=0.1)  # scores of another shape: not those
    assert all(value.shape[1] == 1 for value in other.mask.values.values())


@pytest.mark.slow
def test_a_price_holds_what_need_not_be_removed(lab):
    """Adam moves every logit at one rate, by noise where there is no signal; the price leaves those where they were."""
    of, removed = learnable(lab), []
    for price in (0.0, 5.0):
        found = family("somf", of, steps=20, batch_size=6, warm_share=0, removal_price=price)
        removed.append(torch.cat([1 - value.flatten() for value in found.mask.values.values()]))
    start = 1 - float(torch.sigmoid(torch.tensor(2.5)))
    assert float(removed[0].mean()) > 2 * start
    assert float(removed[1].mean()) < start / 2 and float(removed[1].median()) < 0.01
    assert float(removed[1].max()) > 0.5  # what refusals hang on goes all the same


def test_default_starts_from_what_refusals_hang_on(lab):
    found = family("somf", learnable(lab), steps=0)
    low, high = torch.sigmoid(torch.tensor([-1.0, 2.5])).mul(255).round().div(255).tolist()
    entries = torch.cat([value.flatten() for value in found.mask.values.values()])
    assert sorted(set(entries.tolist())) == pytest.approx([low, high])
    assert float((entries < 0.5).float().mean()) == pytest.approx(0.05, abs=1 / len(entries))


def test_initial_is_where_the_others_start(lab):
    for given, logit in (({"initial": 0.5}, 0.5), ({"initial": 0.5, "warm_kept": 1.5}, 1.5)):
        found = family("somf", learnable(lab), steps=0, **given)
        high = max(float(value.max()) for value in found.mask.values.values())
        assert high == pytest.approx(float(torch.sigmoid(torch.tensor(logit))), abs=1 / 510)


def test_somf_on_all_weights_goes_from_the_tuned_model_to_the_aligned_one(lab):
    """Embedding, norms and head, too; the model that is masked may be another (`Source` gives the base)."""
    of = learnable(lab, tuned=("full_all",), aligned="full2")
    found = family("somf", of, steps=0, warm_share=0, initial=-30.0)
    assert set(found.mask.values) == set(of.names)
    for strength, end in ((0.0, "full_all"), (1.0, "full2")):
        read = lab.open(end).read
        assert all(torch.allclose(found.at(strength)(name), read(name), atol=1e-6) for name in of.names)


def test_somf_on_full_weights(lab, tmp_path):
    of = learnable(lab, tuned=("full",), aligned="base")
    found = family("somf", of, steps=2, batch_size=5)
    assert set(found.mask.values) == {n for n in of.names if "_proj" in n}
    out = write_realigned(tmp_path / "out", of.vectors, found.at(1.0), lab.open("full"), "")
    assert not torch.allclose(logits(lab.plain(out)), logits(lab.plain("full")), atol=1e-3)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_further_training(lab, tmp_path, loss):
    of = learnable(lab, tmp_path / "work")
    seen = []
    of = replace(of, progress=lambda step, *_: seen.append(step))
    found = family("further_training", of, loss=loss, steps=2, batch_size=4, learning_rate=1e-2)
    assert seen == [1, 2]
    moved = 0.0
    for name in of.names:
        tuned = of.vectors[0].aligned(name) + of.vectors[0].delta(name)
        whole, half = found.at(1.0)(name), found.at(0.5)(name)
        torch.testing.assert_close(half - tuned, 0.5 * (whole - tuned), rtol=1e-4, atol=1e-6)
        moved += float((whole - tuned).abs().sum())
    assert moved > 0.1
    if loss == "sft":
        family("further_training", of, loss=loss, steps=2, batch_size=4, learning_rate=1e-2)
        assert seen == [1, 2]  # done before, so read
        family("further_training", of, loss=loss, steps=1, batch_size=4, learning_rate=1e-2)
        assert seen == [1, 2, 1]  # other settings, so trained
        family("further_training", of, loss=loss, steps=1, batch_size=4, learning_rate=1e-2, shares={"safety": 1.0})
        assert seen == [1, 2, 1, 1]
    else:
        with pytest.raises(InputError, match="shares are of the examples of SFT"):
            family("further_training", of, loss=loss, steps=1, shares={"safety": 1.0})


def test_further_training_of_all_weights(lab, tmp_path):
    """θ_k + s (θ' − θ_k) over every tensor, with θ' as it was written."""
    of = learnable(lab, tmp_path / "work", tuned=("full",), aligned="base")
    found = family("further_training", of, loss="sft", steps=2, batch_size=4, learning_rate=1e-2)
    written = open_checkpoint(tmp_path / "work" / "further")
    moved = 0
    for name in of.names:
        tuned = of.vectors[0].aligned(name) + of.vectors[0].delta(name)
        torch.testing.assert_close(found.at(1.0)(name), written.read(name).float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.at(0.25)(name), 0.75 * tuned + 0.25 * written.read(name).float())
        moved += not torch.equal(written.read(name).float(), tuned)
    assert moved == len(of.names)


def test_further_training_needs_one_model_and_a_directory(lab):
    with pytest.raises(InputError, match="continues one tuned model"):
        family("further_training", learnable(lab, tuned=("tuned", "tuned2")))
    with pytest.raises(InputError, match="directory to work in"):
        family("further_training", learnable(lab))
    assert task_vector(lab.open("tuned"), lab.open("safe")).names


def test_masks_of_their_own_are_written_and_read(lab, tmp_path):
    """Two tuned models, a mask each: what training left, what the directory holds and what the fusion engine gives."""
    from resafe.api import apply_mask
    from resafe.masks.format import load_masks, save_masks

    of = learnable(lab, tmp_path / "work", tuned=("full", "full2"), aligned="base")
    found = family("somf", of, per_task=True, steps=3, batch_size=5)
    assert found.mask is None and len(found.masks) == 2
    assert found.facts["keep_rates"] == [mask.keep_rate for mask in found.masks]
    assert any(not torch.equal(found.masks[0].values[key], found.masks[1].values[key]) for key in found.masks[0].values)
    save_masks(found.masks, tmp_path / "mask")
    read = load_masks(tmp_path / "mask")
    references = [str(lab.root / name) for name in ("full", "full2")]
    out = apply_mask(tmp_path / "mask", str(lab.root / "base"), references, out=tmp_path / "out", strength=1.0)
    fused = tmp_path / "fused"
    execute(build_plan(Request(str(lab.root / "base"), tuple(map(Input, references)), fused, "mask",
                               {"file": str(tmp_path / "mask")}), lab.root / "cache"), threads=1)  # fmt: skip
    one, two = open_checkpoint(out), open_checkpoint(fused)
    for name in of.vectors[0].names:
        if name in read[0].values:
            wanted = of.vectors[0].aligned(name) + sum(
                mask.weight(name) * vector.delta(name) for mask, vector in zip(read, of.vectors, strict=True)
            )
            torch.testing.assert_close(one.read(name), wanted, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(two.read(name), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="2 masks, and 1 tuned"):
        apply_mask(tmp_path / "mask", str(lab.root / "base"), references[:1], out=tmp_path / "no")


def test_what_ties_trains_on_is_what_it_writes(lab):
    """With TIES the trained model and the exported one agree: both trim what the mask leaves."""
    of = replace(learnable(lab, tuned=("tuned", "tuned2")), fusion=Fusion("ties", {"keep": 0.4}))
    model, values = masked_model(of, MaskSettings(), 0)
    torch.manual_seed(0)
    for value in values.values.values():
        value.data = torch.round(torch.sigmoid(torch.randn(value.shape)) * 255).div(255).clamp(0.01, 0.99).logit()
    values.refresh()
    masks = values.masks_of({key: torch.sigmoid(value) for key, value in values.values.items()}, MaskSettings())
    exported = mask_family(of, masks, (1.0,)).at(1.0)
    for module in model.modules():
        if isinstance(module, MaskedWeight):
            torch.testing.assert_close(module(), exported(module.name), rtol=1e-4, atol=1e-6)


def test_second_order_scores_by_hand(lab):
    of = learnable(lab)
    model, values = masked_model(of, MaskSettings(granularity="tensor", sampling="direct", initial=1.0), 0)
    items, pad = encoded_items(of)
    few = [item for item in items if item.side == "safety"]
    found = second_order(model, values, few, pad)
    plain = lab.adapted("tuned")
    factors = {n.replace(".default", ""): p for n, p in plain.named_parameters() if "lora_" in n}
    for parameter in factors.values():
        parameter.requires_grad_(True)
    wanted = dict.fromkeys(of.names, 0.0)
    for item in few:
        plain.zero_grad()
        ids = torch.tensor([item.chosen.prompt + item.chosen.answer])
        start, count = len(item.chosen.prompt), len(item.chosen.answer)
        picked = plain(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        (-picked.gather(1, ids[0, start:, None]).mean()).backward()
        for name in of.names:
            slope = float((of.vectors[0].delta(name) * factors[name].grad).sum())  # of a scale on the whole tensor
            wanted[name] += (slope - 0.5 * count * slope**2) / len(few)
    for name in of.names:
        assert float(found[name]) == pytest.approx(wanted[name], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("granularity", ["entry", "row", "rank"])
@pytest.mark.parametrize("fisher", [False, True])
def test_selector_over_several_tasks(lab, granularity, fisher):
    of = learnable(lab, tuned=("tuned", "tuned2"))
    of = replace(of, fusion=Fusion("average"))
    found = family("selector", of, granularity=granularity, shares=[0.3], examples=2, fisher=fisher, per_task=True)
    removed = 0
    for name in of.names:
        value = found.at(0.3)(name)
        parts = [vector.delta(name) for vector in of.vectors]
        left = value - of.vectors[0].aligned(name)
        keeps = [torch.zeros_like(left), parts[0] / 2, parts[1] / 2, (parts[0] + parts[1]) / 2]
        distance = torch.stack([(left - keep).abs() for keep in keeps]).amin(0)
        assert float(distance.max()) < 1e-6  # every entry is that of neither, of one or of both tasks
        removed += int(((left - keeps[3]).abs() > 1e-7).sum())
    assert removed > 0


def test_selector_on_full_weights(lab):
    of = learnable(lab, tuned=("full",), aligned="base")
    found = family("selector", of, granularity="row", shares=[0.2], examples=2)
    rows = 0
    for name in of.names:
        aligned, delta, value = of.vectors[0].aligned(name), of.vectors[0].delta(name), found.at(0.2)(name)
        if "_proj" not in name:
            assert torch.equal(value, aligned)
            continue
        gone = (value == aligned).all(1)
        rows += int(gone.sum())
        torch.testing.assert_close(value[~gone], (aligned + delta)[~gone])
    assert 0 < rows <= round(0.2 * found.facts["entries"])


@pytest.mark.slow
def test_several_models_are_held_apart_only_where_they_teach(lab, monkeypatch):
    """Each task vector by itself costs memory, so only for a loss, a batch and examples that need it."""
    asked, usual = [], learn.masked_model

    def seen(*given):
        asked.append(given[4])
        return usual(*given)

    monkeypatch.setattr(learn, "masked_model", seen)
    of = replace(learnable(lab, tuned=("tuned", "tuned2")), keep_of=[0, 1, 1])
    short = {"steps": 1, "batch_size": 4}
    for problem_, settings in (
        (of, {}),
        (of, {"preset": "labels", "task_divergence": 0.5}),
        (of, {"preset": "labels"}),
        (of, {"shares": {"safety": 1.0}}),
        (replace(of, keep_of=()), {}),
        (replace(learnable(lab), keep_of=[0, 0, 0]), {}),
    ):
        family("somf", problem_, **short, **settings)
    assert asked == [True, True, False, False, False, False]
