"""Sets "on the Hub", read by the real `datasets` library from folders laid out as there; only the address differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from resafe.data.intake_sources import load_training
from resafe.data.items import DialoguePair
from resafe.errors import InputError

Put = Callable[..., None]
TALK = "\n\nHuman: one\n\nAssistant: 1\n\nHuman: two\n\nAssistant:"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts rows "on the Hub": `put(id, {split: rows}, config)`."""
    real: Any = datasets.load_dataset

    def put(name: str, splits: dict[str, list[dict[str, Any]]], config: str = "default") -> None:
        folder = tmp_path / name
        (folder / config).mkdir(parents=True)
        files = []
        for split, rows in splits.items():
            (folder / config / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            files.append({"split": split, "path": f"{config}/{split}.jsonl"})
        card = json.dumps({"configs": [{"config_name": config, "data_files": files}]})
        (folder / "README.md").write_text(f"---\n{card}\n---\n")

    def load(path: str, config: str | None = None, **settings: Any) -> Any:
        if not (tmp_path / path).is_dir():
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        return real(str(tmp_path / path), config, cache_dir=str(tmp_path / "cache"), **settings)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return put


def test_the_instruction_sets_of_the_hub(hub: Put) -> None:
    row = {"instruction": "जोड़ो", "input": "१ २", "output": "३"}
    hub("iamshnoo/alpaca-cleaned-hindi", {"train": [row, {**row, "output": ""}]})
    hub("sahil2801/CodeAlpaca-20k", {"train": [row]})
    sums = {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
    hub("openai/gsm8k", {"train": [sums], "test": [{**sums, "question": "never"}]}, "main")
    data = load_training("alpaca_hindi", "examples", max_bad_share=0.5)
    assert [(item.prompt, item.response) for item in data.examples] == [("जोड़ो\n\n१ २", "३")]
    named = data.report.named["empty"]
    assert named == ["iamshnoo/alpaca-cleaned-hindi, train row 1: the answer is empty"]
    assert load_training("codealpaca", "examples").examples[0].response == "३"
    (item,) = load_training("gsm8k", "examples").examples
    assert (item.prompt, item.response) == ("1 + 1?", "1 + 1 = 2\nThe answer is 2.")


def test_a_users_set_with_configuration_and_split(hub: Put) -> None:
    parts = {split: [{"prompt": f"{split}?", "response": "a"}] for split in ("train", "dev")}
    hub("me/mine", parts, "small")
    assert load_training("me/mine:small:dev", "examples").examples[0].prompt == "dev?"
    assert load_training("me/mine", "examples").examples[0].prompt == "train?"
    assert load_training("me/mine:dev", "examples").examples[0].prompt == "dev?"
    with pytest.raises(InputError, match=r"cannot stream me/mine \(split test\) from the Hub"):
        load_training("me/mine:test", "examples")
    with pytest.raises(InputError, match="cannot stream me/yours .* doesn't exist"):
        load_training("me/yours", "examples")


def test_llamafactorys_hub_entry(hub: Put, tmp_path: Path) -> None:
    hub("me/mine", {"train": [{"question": f"q{n}", "input": "not read", "reply": "a"} for n in range(4)]})
    entry = {
        "hf_hub_url": "me/mine", "subset": "default", "num_samples": 2,
        "columns": {"prompt": "question", "response": "reply"},
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    data = load_training(f"{tmp_path}/dataset_info.json:x", "examples")
    assert [item.prompt for item in data.examples] == ["q0", "q1"]


def test_published_preference_sets_lose_the_rows_that_are_no_pairs(hub: Put) -> None:
    good = {"chosen": f"{TALK} 2", "rejected": f"{TALK} 3"}
    odd = [
        {"chosen": f"{TALK} 2", "rejected": f"{TALK} 2"},  # no preference
        {"chosen": f"{TALK} 2", "rejected": "\n\nHuman: one\n\nAssistant: other"},  # part ways earlier
        {"chosen": f"{TALK} 2", "rejected": f"{TALK} "},
        {"chosen": "\n\nHuman: one\n\nHuman: two\n\nAssistant: 2", "rejected": "\n\nHuman: one\n\nAssistant: 2"},
    ]
    hub("Anthropic/hh-rlhf", {"train": [good, *odd]})
    data = load_training("hh_rlhf", "pairs", max_bad_share=0.0)
    assert (data.report.rows, data.report.kept, data.report.unused, data.report.bad) == (5, 1, 4, {})
    (pair,) = data.pairs
    assert isinstance(pair, DialoguePair)
    assert (pair.history, pair.prompt, pair.chosen) == ((("user", "one"), ("assistant", "1")), "two", "2")
    turns = [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]
    worse = [turns[0], {"role": "assistant", "content": "red"}]
    more = {"prompt_id": "p", "messages": turns, "score_chosen": 8.0, "score_rejected": 4.0}  # as on the Hub
    rows = [{"prompt": "sky?", "chosen": turns, "rejected": other, **more} for other in (worse, turns)]
    hub("HuggingFaceH4/ultrafeedback_binarized", {"train_prefs": rows, "test_prefs": rows[:1]})
    data = load_training("ultrafeedback", "pairs")
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in data.pairs] == [("sky?", "blue", "red")]
    assert data.report.unused == 1
    hub("PKU-Alignment/PKU-SafeRLHF", {"train": [
        {"prompt": "p", "response_0": "x", "response_1": "y", "is_response_0_safe": False, "is_response_1_safe": True,
         "better_response_id": 0, "safer_response_id": 1},
        {"prompt": "p", "response_0": "x", "response_1": "y", "is_response_0_safe": True, "is_response_1_safe": True,
         "better_response_id": 0, "safer_response_id": 1},
    ]})  # fmt: skip
    data = load_training("pku_saferlhf_full", "pairs")
    assert [(pair.chosen, pair.rejected) for pair in data.pairs] == [("y", "x")] and data.report.unused == 1


def test_offline_the_local_cache_is_read(hub: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    inner = datasets.load_dataset

    def load(*args: Any, streaming: bool, **settings: Any) -> Any:
        asked.append(streaming)
        return inner(*args, streaming=streaming, **settings)

    hub("me/mine", {"train": [{"prompt": "q", "response": "a"}]})
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(load_training("me/mine", "examples").examples) == 1
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set and it is not in the local cache"):
        load_training("me/yours", "examples")
    assert asked == [False, False]
