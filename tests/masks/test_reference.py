"""The fixed reference: its log-probabilities are computed once, and used again where nothing of theirs differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resafe.data.items import Pair
from resafe.fusion import Fusion
from resafe.masks import MaskTrainer, answer_log_probabilities, encode_items
from resafe.masks import reference as reference_module
from resafe.masks.engine import EngineSettings
from resafe.masks.pairs import shares_prompts
from tests.evals.tiny import tiny_tokenizer, windowed
from tests.masks.test_modules import masked, with_factors
from tests.masks.test_train import ITEMS, SHORT, trainer
from tests.realign.test_learned import family, learnable
from tests.tiny import KEEP, PAIRS

DPO = replace(SHORT, loss="sigmoid")


@pytest.fixture
def computed(monkeypatch):
    """Every call that computes a table."""
    calls, original = [], reference_module.reference_log_probabilities

    def counted(*arguments):
        calls.append(arguments[3])
        return original(*arguments)

    monkeypatch.setattr("resafe.masks.train.reference_log_probabilities", counted)
    return calls


def test_reference_is_that_of_the_tuned_model(lab):
    table = trainer(lab, DPO).reference()
    model = lab.adapted("tuned")
    with torch.no_grad():
        chosen, _ = answer_log_probabilities(model, [item.chosen for item in ITEMS[:10]], 1)
        rejected, _ = answer_log_probabilities(model, [item.rejected for item in ITEMS[:10]], 1)
    torch.testing.assert_close(table[:10], torch.stack([chosen, rejected], dim=1), rtol=1e-4, atol=1e-4)
    assert table[10:].abs().sum() == 0


@pytest.mark.parametrize(
    "other",
    [
        {"settings": replace(DPO, beta=0.2)},
        {"settings": replace(DPO, learning_rate=0.3, steps=9)},
        {"settings": replace(DPO, loss="ipo", removal_price=1.0)},
        {"mask": {"granularity": "row", "initial": 2.0}},
    ],
    ids=["beta", "learning rate and steps", "loss", "mask"],
)
def test_another_training_uses_it_again(lab, tmp_path, computed, other):
    first = trainer(lab, DPO, work=tmp_path)
    table = first.reference()
    second = trainer(lab, **{"settings": DPO, **other}, work=tmp_path)
    assert torch.equal(second.reference(), table)
    assert computed == ["tuned"] and second.identity() != first.identity()
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"tuned": "tuned2"},
        {"settings": replace(DPO, reference="aligned")},
        {"items": [replace(ITEMS[1], index=0), replace(ITEMS[0], index=1), *ITEMS[2:]]},
        {"engine": EngineSettings(share_prompts=True)},
        {"models": "of another fusion"},
    ],
    ids=["task vectors", "reference", "items", "passes", "models"],
)
def test_what_it_depends_on_has_it_computed_anew(lab, tmp_path, computed, other):
    trainer(lab, DPO, work=tmp_path).reference()
    trainer(lab, **{"settings": DPO, **other}, work=tmp_path).reference()
    assert len(computed) == 2
    trainer(lab, DPO, work=tmp_path).reference()  # both are kept
    assert len(computed) == 2 and len(list(tmp_path.glob("reference-*.safetensors"))) == 2


def test_a_window_keeps_prompts_apart_and_no_table_of_shared_ones_is_used(lab, tmp_path, monkeypatch):
    """Of such models older tables came from prompts that were shared wherever the first pair fits into the window."""
    long = Pair("long", " ".join(f"w{n}" for n in range(24)), "w20 w21", "w60")
    items = encode_items(tiny_tokenizer(), None, [*PAIRS, long], KEEP)
    pairs = [(item.chosen, item.rejected) for item in items if item.rejected]
    window = len(pairs[0][0]) + len(pairs[0][1].answer)

    def table():
        monkeypatch.setattr(lab.__class__, "plain", lambda self, name="base": windowed(window, original(self, name)))
        return trainer(lab, DPO, items=items, work=tmp_path, engine=EngineSettings(share_prompts=True)).reference()

    original, found = lab.__class__.plain, shares_prompts
    monkeypatch.setattr("resafe.masks.train.shares_prompts", lambda *_: True)
    shared = table()
    monkeypatch.setattr("resafe.masks.train.shares_prompts", found)
    apart = table()
    assert float((shared - apart).abs().max()) > 0.01 and len(list(tmp_path.glob("reference-*.safetensors"))) == 2
    model = with_factors(lab, {name: lab.open("tuned").read(name) for name in lab.open("tuned").tensors})
    with torch.no_grad():
        wanted = [answer_log_probabilities(model, list(pair), 1)[0] for pair in pairs]
    torch.testing.assert_close(apart[: len(pairs)], torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_another_precision_has_it_computed_anew(lab, tmp_path, computed):
    for dtype in (torch.float32, torch.bfloat16):
        model, values, _ = masked(lab)
        model.to(dtype), values.to(torch.float32)
        MaskTrainer(model, values, ITEMS, DPO, pad_id=1, work=tmp_path).reference()
    assert len(computed) == 2


def test_a_damaged_file_is_computed_anew(lab, tmp_path, computed):
    table = trainer(lab, DPO, work=tmp_path).reference()
    (file,) = tmp_path.glob("reference-*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(trainer(lab, DPO, work=tmp_path).reference(), table) and len(computed) == 2


def test_methods_keep_it_between_calls(lab, tmp_path, computed, monkeypatch):
    """Work directories go when a mask is done; this stays in the cache, by checkpoints and fusion."""
    monkeypatch.setenv("RESAFE_CACHE", str(tmp_path / "cache"))
    common = {"steps": 1, "batch_size": 4, "loss": "sigmoid", "share_prompts": False}
    for number, (beta, tuned, fusion) in enumerate(
        [
            (0.1, ("tuned",), Fusion("task_arithmetic")),
            (0.3, ("tuned",), Fusion("task_arithmetic")),
            (0.3, ("tuned",), Fusion("task_arithmetic", {"weight": 0.5})),
        ]
    ):
        of = replace(learnable(lab, tmp_path / f"work{number}", tuned=tuned), fusion=fusion)
        family("somf", of, beta=beta, **common)
        assert len(computed) == (1, 1, 2)[number]
    assert len(list((tmp_path / "cache" / "references").glob("*.safetensors"))) == 2
    family("somf", learnable(lab), **common)  # without a work directory nothing is kept, nor looked for
    assert len(computed) == 3
