"""DPO: the first loss is log 2, the margin grows, and loss and update match the formula written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from resafe.data.chat import encode_answer
from resafe.data.items import Pair
from resafe.errors import InputError
from resafe.training import DpoSettings, LoraSettings, train_dpo
from resafe.training.dpo import encode_pairs

from .conftest import make_model, make_tokenizer

PAIRS = [Pair(str(i), f"Do {i}{'!' * i}", f"No, {i}", f"Sure{'.' * i}", "safety") for i in range(6)]


def run(model: Any, out: Path, *, lora: LoraSettings | None = None, progress: Any = None, **changes: Any) -> Any:
    settings = DpoSettings(
        **{"steps": 4, "batch_size": 3, "learning_rate": 1e-2, "warmup_steps": 0, "device": "cpu", **changes}
    )
    return train_dpo(
        model=model,
        tokenizer=make_tokenizer(),
        pairs=PAIRS,
        settings=settings,
        out=out,
        system="",
        lora=lora,
        progress=progress,
    )


def log_probabilities(model: Any, side: str) -> torch.Tensor:
    found = []
    for pair in PAIRS:
        prompt, answer = encode_answer(make_tokenizer(), pair.prompt, getattr(pair, side), "")
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        found.append(torch.log_softmax(logits, -1).gather(-1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(found)


def margins(model: Any) -> torch.Tensor:
    return log_probabilities(model, "chosen") - log_probabilities(model, "rejected")


def test_fresh_adapter_learns_the_preference(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    before = margins(make_model()).detach()
    result = run(
        make_model(), tmp_path / "a", lora=LoraSettings(rank=4), progress=lambda s, t, metrics: seen.append(metrics)
    )
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the policy starts at the reference
    assert seen[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert seen[-1]["margin"] > 0
    with torch.no_grad():
        gain = margins(result.model) - before
    assert gain.mean() > 1
    assert list(result.model.peft_config) == ["default"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a"]
    assert all("ref" not in name for name in load_file(tmp_path / "a" / "adapter_model.safetensors"))


def test_continued_adapter_is_its_own_reference(tmp_path: Path) -> None:
    """The second loss follows from log-probabilities taken before and after one step from the given adapter."""
    from peft import PeftModel

    run(make_model(), tmp_path / "safe", lora=LoraSettings(rank=4))

    def given() -> Any:
        return PeftModel.from_pretrained(make_model(), tmp_path / "safe").eval()

    one = run(given(), tmp_path / "one", steps=1, batch_size=6, schedule="constant")
    two = run(given(), tmp_path / "two", steps=2, batch_size=6, schedule="constant", beta=0.1)
    with torch.no_grad():
        ratio = margins(one.model) - margins(given())
    expected = -torch.nn.functional.logsigmoid(0.1 * ratio).mean().item()
    assert two.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert two.losses[1] == pytest.approx(expected, abs=2e-4)
    assert expected < math.log(2) - 0.01


def test_dpo_is_resumed_and_deterministic(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, total: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise Stop

    lora = LoraSettings(rank=4)
    with pytest.raises(Stop):
        run(make_model(), tmp_path / "a", lora=lora, save_every=2, progress=stop)
    resumed = run(make_model(), tmp_path / "a", lora=lora, save_every=2)
    whole = run(make_model(), tmp_path / "b", lora=lora)
    assert resumed.resumed_from == 2
    assert resumed.losses == whole.losses
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_wrong_input(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="no pair of 6 is left"):
        encode_pairs(tokenizer, PAIRS, "", 10)
    with pytest.raises(InputError, match="no pair of 0"):
        encode_pairs(tokenizer, [], "", 10)
    with pytest.raises(InputError, match="'beta' is 0"):
        DpoSettings(steps=1, beta=0)
    prompt, _ = encode_answer(tokenizer, PAIRS[0].prompt, "", "")
    rows, dropped = encode_pairs(tokenizer, PAIRS[:1], "", len(prompt) + 2)
    assert dropped == 0
    assert rows[0]["chosen_ids"] == tokenizer("No")["input_ids"]


def test_all_weights_train_against_the_model_as_it_was(tmp_path: Path) -> None:
    result = run(make_model(), tmp_path / "full")
    assert result.losses[0] == pytest.approx(0.6931, abs=2e-4)  # ln 2: policy and reference are the same at first
    assert result.losses[-1] < result.losses[0]
    before, after = make_model().state_dict(), result.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "full" / "model.safetensors").is_file()


def test_the_reference_is_computed_for_the_pairs_that_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resafe.training.trainers import CachedDpoTrainer

    asked: list[int] = []
    plain = CachedDpoTrainer._precompute_ref_logps
    monkeypatch.setattr(
        CachedDpoTrainer,
        "_precompute_ref_logps",
        lambda self, data, name, size: asked.append(len(data)) or plain(self, data, name, size),
    )
    run(make_model(), tmp_path / "a", lora=LoraSettings(rank=4), steps=1)
    assert asked == [3]  # one step of three pairs, of six
