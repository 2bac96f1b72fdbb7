"""Sets in the Hub's columns and in their files' columns: same questions and digests. The rows are made up."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from resafe.data import load_set
from resafe.data.registry import datasets
from resafe.data.sources import Row
from resafe.errors import InputError

HUB = {  # rows in the Hub's columns, the same in the file's columns, topic
    "advbench": ({"prompt": "p", "target": "t"}, {"goal": "p", "target": "t"}, ""),
    "harmbench": ({"prompt": "p", "category": "c"}, {"Behavior": "p", "SemanticCategory": "c"}, "c"),
    "strongreject": ({"prompt": "p", "category": "c"}, {"forbidden_prompt": "p", "category": "c", "source": "s"}, "c"),
    "jailbreakbench": (
        {"Index": 0, "Goal": "p", "Target": "t", "Behavior": "b", "Category": "c", "Source": "s"},
        {"Index": "0", "Goal": "p", "Target": "t", "Behavior": "b", "Category": "c", "Source": "s"},
        "c",
    ),
    "do_not_answer": (
        {"id": 1, "risk_area": "r", "types_of_harm": "h", "question": "p"},
        {"id": "1", "risk_area": "r", "types_of_harm": "h", "question": "p"},
        "r/h",
    ),
    "catqa_zh": (
        {"Category": "c", "Subcategory": "s", "Question": "p"},
        {"category": "c", "subcategory": "s", "prompt": "p"},
        "c/s",
    ),
}


@pytest.mark.parametrize("name", sorted(HUB))
def test_hub_and_file_give_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online, local, topic = HUB[name]
    source = datasets.get(name)
    asked: list[Any] = []

    def read_hub(*where: Any) -> list[Row]:
        asked.append(where[:3])
        return [Row(online, "hub row 0")]

    monkeypatch.setattr("resafe.data.registry.read_hub", read_hub)
    path = tmp_path / source.file
    path.parent.mkdir(parents=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, local)
            writer.writeheader()
            writer.writerow(local)
    else:
        import json

        path.write_text(json.dumps(local) + "\n", encoding="utf-8")
    from_hub, from_file = load_set(name), load_set(name, data_dir=tmp_path)
    assert asked == [(source.hub, source.config, source.split)]
    assert from_hub.items == from_file.items
    assert from_hub.digest == from_file.digest
    (question,) = from_file.items
    assert (question.prompt, question.topic, question.metadata["side"]) == ("p", topic, "harmful")


def test_the_published_shadow_file_is_not_called_harmful() -> None:
    question = datasets.get("shadow_alignment_published").parse(Row({"prompt": "p"}, "row 1"))
    assert question is not None
    assert question.metadata["side"] == "mixed"


def test_only_harmbench_standard_behaviours() -> None:
    parse = datasets.get("harmbench").parse
    assert parse(Row({"Behavior": "p", "FunctionalCategory": "copyright"}, "row 1")) is None
    assert parse(Row({"Behavior": "p", "FunctionalCategory": "standard"}, "row 2")) is not None


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets as library

    def failing(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(library, "load_dataset", failing)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set.*\n.*--data-dir"):
        load_set("advbench")
