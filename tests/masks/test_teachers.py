"""Teachers that say once what a training asks of them: the numbers are those of passes at every step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from resafe.checkpoints import load_model
from resafe.deltas import task_vector
from resafe.masks import Encoded, MaskSettings, MaskTrainer, encode_items, install_masks
from resafe.masks import teachers as teachers_module
from resafe.masks.losses import answer_logits, answer_states
from resafe.masks.teachers import state_logits
from tests.evals.tiny import tiny_tokenizer
from tests.masks.test_modules import masked
from tests.masks.test_train import ITEMS, SHORT, KilledError, trainer
from tests.tiny import KEEP, PAIRS, saved_pair

DISTILL = replace(SHORT, loss="distill", removal_price=0.5)
OWNED = encode_items(tiny_tokenizer(), None, PAIRS, KEEP, keep_of=[1, 0, 1])
TEXTS = [Encoded((5, 9, 10), (20, 21, 22, 3)), Encoded((5,), (33,)), Encoded(tuple(range(30, 49)), (7, 8))]
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 4.0},
    "Mixtral": {"num_local_experts": 4},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "OPT": {"word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64},
    "RecurrentGemma": {"lru_width": 32, "attention_window_size": 64, "num_hidden_layers": 3, "logits_soft_cap": 2.0},
    "Rwkv": {"context_length": 64},
}


def passing(patch):
    """From here on no model goes on from states."""
    patch.setattr(teachers_module, "goes_on_from_states", lambda *_: False)


@pytest.fixture
def passes(monkeypatch):
    """How many sequences teachers were asked to pass, of which states and of which logits were wanted."""
    calls = {"states": 0, "logits": 0}

    def counted(name, original):
        def found(model, sequences, pad_id):
            calls[name] += len(sequences)
            return original(model, sequences, pad_id)

        return found

    monkeypatch.setattr(teachers_module, "answer_states", counted("states", answer_states))
    monkeypatch.setattr(teachers_module, "answer_logits", counted("logits", answer_logits))
    return calls


def gradients(made, batch=None):
    loss, metrics = made.loss(batch or made.batches.at(0))
    loss.backward()
    return loss.detach(), metrics, {key: value.grad for key, value in made.logits.values.items()}


CASES = {
    "adapters": ({}, DISTILL, ITEMS),
    "rows of full weights and a tied head": (
        {"tuned": ("tied_full",), "aligned": "tied", "base": "tied", "granularity": "row"}, DISTILL, ITEMS
    ),
    "several tuned models": (
        {"tuned": ("tuned", "tuned2"), "apart": True, "per_task": True, "initial": 0.5}, DISTILL, OWNED
    ),
    "beside labels": ({}, replace(SHORT, task_divergence=2.0), ITEMS),
    "beside distillation": ({}, replace(DISTILL, task_divergence=2.0), ITEMS),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_passes_at_every_step(lab, monkeypatch, passes, name):
    plan, settings, items = CASES[name]
    settings = replace(settings, batch_size=9)

    def one():
        model, values, _ = masked(lab, **plan)
        return MaskTrainer(model, values, items, settings, pad_id=1)

    kept = one()
    loss, metrics, found = gradients(kept)
    taught = [item for item in items if item.side == "task" or settings.loss == "distill"]
    assert kept.teachers().kept == len(taught)
    tried = passes["logits"]
    assert tried <= 2 * len({kept.teachers().of(item) for item in taught}) and passes["states"] == tried + len(taught)
    kept.loss(kept.batches.at(1))
    assert passes["logits"] == tried  # no pass at a step
    passing(monkeypatch)
    other = one()
    wanted_loss, wanted_metrics, wanted = gradients(other)
    assert other.teachers().kept == 0 and passes["logits"] > tried
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-7)
    assert metrics.keys() == wanted_metrics.keys() >= {"kl/task"} and min(metrics["kl/task"], float(loss)) > 1e-3
    for key, value in wanted_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-7)
    assert max(float(gradient.abs().max()) for gradient in wanted.values()) > 1e-3


def family(path, kind):
    """A model masked by ones that learn, and the tuned one itself."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **KINDS[kind]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    base, tuned = saved_pair(model, path, base=0.2, tuned=0.1)
    found, vector = load_model(base), task_vector(tuned, base)
    plan = MaskSettings(initial=0.5)
    values = install_masks(found, [vector], plan, seed=0, combine=lambda n, d: d[0], linear=True)
    return found, values, load_model(base), load_model(tuned)


@pytest.mark.filterwarnings("ignore:.*computes padded sequences otherwise")
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_a_plain_pass(tmp_path, monkeypatch, kind):
    """Whatever a model does with its logits, whatever its decoder gives beside states, and where it minds padding."""
    model, values, base, tuned = family(tmp_path, kind)
    items = [replace(ITEMS[0], index=n, side=side, chosen=text, rejected=None)
             for n, (side, text) in enumerate(zip(("safety", "task", "task"), TEXTS, strict=True))]  # fmt: skip
    settings = replace(DISTILL, batch_size=3, shares={"safety": 1, "task": 2})
    made = MaskTrainer(model, values, items, settings, pad_id=1)
    teachers = made.teachers()
    assert teachers.kept == 3
    with monkeypatch.context() as patch:
        patch.setattr(teachers_module, "answer_logits", None)
        said = teachers.say(items, range(3))
    for item, plain in zip(items, (base, tuned, tuned), strict=True):
        with torch.no_grad():
            ids = torch.tensor([item.chosen.prompt + item.chosen.answer])
            wanted = plain(input_ids=ids, use_cache=False).logits[0, len(item.chosen.prompt) - 1 : -1]
            states = answer_states(plain, [item.chosen], 1)
        torch.testing.assert_close(said[item.index], wanted, rtol=1e-4, atol=1e-5)
        head = torch.nn.functional.linear(states, plain.get_output_embeddings().weight)
        changed = float((head - wanted).abs().max())
        assert changed > 0.1 if kind in ("Gemma2", "Cohere", "Granite", "RecurrentGemma") else changed < 1e-4
    loss, _, found = gradients(made, items)
    passing(monkeypatch)
    by_passes = MaskTrainer(model, values, items, settings, pad_id=1)
    values.zero_grad()
    assert float(loss) == pytest.approx(float(by_passes.loss(items)[0]), rel=1e-5)
    assert by_passes.teachers().kept == 0 and max(float(gradient.abs().max()) for gradient in found.values()) > 1e-4


def by_hand(made, batch):
    """(n_pairs KL(π_aligned ‖ π) + n_task KL(π_tuned ‖ π)) / n and the mean removed share, one sequence at a time."""
    parts = {"zeros": [], "ones": []}
    for item in batch:
        teacher = "ones" if item.side == "task" else "zeros"
        with torch.no_grad():
            ids, start = torch.tensor([item.chosen.prompt + item.chosen.answer]), len(item.chosen.prompt)
            ours = made.model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
            with made.logits.reading(teacher):
                theirs = made.model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        parts[teacher].append((theirs.exp() * (theirs - ours)).sum(1))
    divergence = sum(torch.cat(few).mean() * len(few) for few in parts.values() if few) / len(batch)
    return float(divergence) + made.settings.removal_price * float(made.logits.removed_share())


class Doubled(LlamaForCausalLM):
    """Doubles what its decoder gives before the head sees it."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **more):
        hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids)[0]
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(2 * hidden))


class Demanding(LlamaForCausalLM):
    """Asks its decoder for what only its own gives."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **more):
        more = {"output_hidden_states": True}
        given = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(given.hidden_states[-1]))


class Nobody(LlamaForCausalLM):
    """Calls nothing its decoder."""

    def get_decoder(self):
        return self


@pytest.mark.parametrize("kind", [Doubled, Demanding, Nobody])
def test_a_model_that_cannot_go_on_from_states_has_its_teachers_pass(lab, monkeypatch, tmp_path, passes, kind):
    """And is told so once: that is kept as states are."""
    usual = lab.__class__.plain

    def plain(self, name="base"):
        model = kind(usual(self, name).config).eval()
        model.load_state_dict(usual(self, name).state_dict())
        return model

    monkeypatch.setattr(lab.__class__, "plain", plain)
    settings = replace(DISTILL, batch_size=9)
    made = trainer(lab, settings, work=tmp_path)
    batch = made.batches.at(0)
    assert float(made.loss(batch)[0]) == pytest.approx(by_hand(made, batch), rel=1e-4)
    assert made.teachers().kept == 0 and len(list(tmp_path.glob("teachers-*.safetensors"))) == 1
    assert not vars(made.model.model).get("forward")  # what stood in for the decoder is gone
    before = dict(passes)
    again = trainer(lab, settings, work=tmp_path)
    assert again.teachers().kept == 0 and passes == before
    assert float(again.loss(batch)[0]) == pytest.approx(by_hand(made, batch), rel=1e-4)


def test_a_batch_that_the_run_does_not_meet_is_passed(lab, passes):
    made = trainer(lab, replace(DISTILL, steps=1))
    met = {item.index for item in made.batches.at(0)}
    assert made.teachers().kept == len(met) < len(ITEMS)
    before = passes["logits"]
    assert float(made.loss(ITEMS)[0]) == pytest.approx(by_hand(made, ITEMS), rel=1e-4)
    assert passes["logits"] == before + len(ITEMS)


@pytest.mark.parametrize(
    "other",
    [
        {"settings": replace(DISTILL, learning_rate=0.3, removal_price=2.0, warmup_steps=0)},
        {"settings": replace(DISTILL, steps=9, seed=3, batch_size=5)},
        {"mask": {"granularity": "row", "initial": 2.0}},
    ],
    ids=["learning rate and price", "batches of the same items", "mask"],
)
def test_another_training_uses_them_again(lab, tmp_path, passes, other):
    first = trainer(lab, DISTILL, work=tmp_path)
    first.run()
    assert first.teachers().kept == len(ITEMS)
    before = dict(passes)
    second = trainer(lab, **{"settings": DISTILL, **other}, work=tmp_path)
    second.run()
    assert passes == before and second.identity() != first.identity()
    assert len(list(tmp_path.glob("teachers-*.safetensors"))) == 1
    for need, states in first.teachers()._states.items():
        assert torch.equal(second.teachers()._states[need], states)  # the bits that were computed


@pytest.mark.parametrize(
    "other",
    [
        {"tuned": "tuned2"},
        {"items": [replace(ITEMS[1], index=0), replace(ITEMS[0], index=1), *ITEMS[2:]]},
        {"settings": replace(DISTILL, steps=1)},
        {"settings": replace(SHORT, task_divergence=1.0)},
        {"models": "of another fusion"},
    ],
    ids=["task vectors", "items", "fewer of them", "one side", "models"],
)
def test_what_they_depend_on_has_them_computed_anew(lab, tmp_path, passes, other):
    trainer(lab, DISTILL, work=tmp_path).teachers()
    before = passes["states"]
    trainer(lab, **{"settings": DISTILL, **other}, work=tmp_path).teachers()
    assert passes["states"] > before
    before = passes["states"]
    trainer(lab, DISTILL, work=tmp_path).teachers()  # both are kept
    assert passes["states"] == before and len(list(tmp_path.glob("teachers-*.safetensors"))) == 2


def test_nobody_is_asked_where_nothing_is_learnt_from_teachers(lab, tmp_path, passes):
    trainer(lab, work=tmp_path).run()
    assert passes == {"states": 0, "logits": 0} and not list(tmp_path.glob("teachers-*"))


@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
def test_a_killed_run_ends_with_the_same_bits(lab, tmp_path, passes, lost):
    """From the file, or computed anew where it is gone."""
    straight = trainer(lab, DISTILL)
    straight.run()

    def kill(step, total, metrics):
        if step == 4:
            raise KilledError

    with pytest.raises(KilledError):
        trainer(lab, DISTILL, work=tmp_path, checkpoint_every=3, progress=kill).run()
    (file,) = tmp_path.glob("teachers-*.safetensors")
    if lost:
        file.write_bytes(file.read_bytes()[:40])
    before, seen = dict(passes), []
    resumed = trainer(lab, DISTILL, work=tmp_path, checkpoint_every=3, progress=lambda *told: seen.append(told))
    resumed.run()
    assert [step for step, _, metrics in seen if metrics] == [4, 5, 6] and (passes == before) == (not lost)
    items = len({item.index for step in range(DISTILL.steps) for item in resumed.batches.at(step)})
    assert [step for step, total, metrics in seen if not metrics and step == total] == [items] * lost
    for key, value in straight.logits.values.items():
        assert torch.equal(resumed.logits.values[key], value), key


def test_a_training_from_before_is_not_gone_on_with(lab, monkeypatch):
    """Its teachers passed with each batch, and a side was a pass: other roundings."""
    for settings, changed in ((SHORT, False), (DISTILL, True), (replace(SHORT, task_divergence=1.0), True)):
        now, seen = trainer(lab, settings), []
        monkeypatch.setattr("resafe.masks.train.digest_value", lambda value, seen=seen: seen.append(value) or "")
        now.identity()
        assert ("teachers once, all sides in one pass" in seen[0]) == changed


def test_a_model_in_bfloat16_has_its_states_in_bfloat16(lab, tmp_path, monkeypatch):
    def one():
        model, values, _ = masked(lab)
        model.to(torch.bfloat16), values.to(torch.float32)
        return MaskTrainer(model, values, ITEMS, replace(DISTILL, batch_size=9), pad_id=1, work=tmp_path)

    made, again = one(), one()
    loss, _, found = gradients(made)
    assert made.teachers().kept == again.teachers().kept == len(ITEMS)
    for need, states in made.teachers()._states.items():
        assert states.dtype == torch.bfloat16 and torch.equal(again.teachers()._states[need], states)
    for path in tmp_path.glob("teachers-*"):
        path.unlink()
    passing(monkeypatch)
    wanted, _, by_passes = gradients(one())
    assert float(loss) == pytest.approx(float(wanted), rel=2e-2)
    for key, gradient in by_passes.items():
        assert torch.nn.functional.cosine_similarity(found[key].flatten(), gradient.flatten(), dim=0) > 0.98


def test_logits_of_states_are_of_the_reading(lab):
    """A masked head is the teacher's as well: states alone do not say whose they are."""
    model, values, _ = masked(lab, ("full_all",), "base")
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for reading, name in (("zeros", "base"), ("ones", "full_all")):
        with torch.no_grad(), values.reading(reading):
            wanted = states @ lab.plain(name).lm_head.weight.T
            torch.testing.assert_close(state_logits(model, states), wanted, rtol=1e-4, atol=1e-5)
