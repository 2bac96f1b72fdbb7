"""Training data against the evaluation sets of the Hub, read by `datasets` itself from folders laid out as there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from resafe.data.items import Example
from resafe.data.overlap import evaluation_prompts, without_overlap
from resafe.data.overlap_sets import _UTILITY
from resafe.errors import InputError
from tests.data.test_hub_streams import Put, hub

__all__ = ["hub"]  # the fixture

ROWS: dict[str, tuple[str | None, str, dict[str, Any]]] = {  # Hub id → configuration, split, a row in its columns
    "aps/super_glue": ("copa", "validation", {"premise": "The sky fell.", "choice1": "a", "choice2": "b"}),
    "cambridgeltl/xcopa": ("zh", "test", {"premise": "天塌了。", "choice1": "a", "choice2": "b"}),
    "facebook/xnli": ("hi", "validation", {"premise": "आसमान गिरा।", "hypothesis": "हाँ", "label": 0}),
    "openai/openai_humaneval": (None, "test", {"task_id": "x/0", "prompt": "def fell(sky):"}),
    "openai/gsm8k": ("main", "test", {"question": "1 + 1?", "answer": "2\n#### 2"}),
    "declare-lab/HarmfulQA": (None, "train", {"topic": "t", "subtopic": "s", "question": "How high?"}),
}


def test_sets_of_the_hub_are_compared_with_and_the_others_named_with_their_reason(hub: Put) -> None:
    for name, (config, split, row) in ROWS.items():
        hub(name, {split: [row]}, config or "default")
    hub("declare-lab/CategoricalHarmfulQA", {"en": [{"other": "column"}]})
    prompts = evaluation_prompts(hub=True)
    reached = {"copa", "xcopa_zh", "xnli_hi", "humaneval", "gsm8k", "harmfulqa"}
    assert reached <= set(prompts.compared) and not reached & set(prompts.absent)
    asked = ["the sky fell", "天塌了", "आसमान गिरा", "def fell(sky)", "1 + 1", "How high", "free"]
    found = without_overlap([Example(str(n), text, "?") for n, text in enumerate(asked)], prompts)
    assert [item.prompt for item in found.kept] == ["free"]
    assert {name: len(ids) for name, ids in found.dropped.items()} == dict.fromkeys(reached, 1)
    absent = found.to_json()["not_at_hand"]
    assert absent["beavertails"].startswith(
        "cannot load PKU-Alignment/BeaverTails-Evaluation (split test) from the Hub"
    )
    assert "doesn't exist on the Hub" in absent["beavertails"]
    assert "column" in absent["catqa"]  # there, but in another layout
    assert absent["dangerousqa"] == "no file of it was given, and it is not on the Hub"


def test_files_come_before_the_hub(hub: Put, tmp_path: Path) -> None:
    hub("openai/gsm8k", {"test": [{"question": "never", "answer": "2\n#### 2"}]}, "main")
    hub("aps/super_glue", {"validation": [{"premise": "far"}]}, "copa")
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_text('{"question": "near", "answer": "2\\n#### 2"}')
    prompts = evaluation_prompts(tmp_path, hub=True)
    assert (prompts.sets["near"], prompts.sets["far"], "never" in prompts.sets) == ("gsm8k", "copa", False)
    (tmp_path / "gsm8k/test.jsonl").write_text("{")
    with pytest.raises(InputError, match="bad JSON"):  # a damaged file is no reason to ask elsewhere
        evaluation_prompts(tmp_path, hub=True)


def test_offline_and_without_asking_nothing_is_fetched(hub: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    hub("aps/super_glue", {"validation": [{"premise": "far"}]}, "copa")
    prompts = evaluation_prompts()
    assert "far" not in prompts.sets
    assert prompts.absent["copa"] == "no file of it was given, and the Hub was not asked"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    prompts = evaluation_prompts(hub=True)  # the folder stands for the local cache
    assert prompts.sets["far"] == "copa"
    assert prompts.absent["xnli_hi"].endswith("HF_HUB_OFFLINE is set and it is not in the local cache")


def test_ids_configurations_and_splits_are_those_of_lm_eval() -> None:
    from resafe.evals.utility.names import TASKS

    found = find_spec("lm_eval")
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent / "tasks"
    for task in _UTILITY:
        file = folder / TASKS[task.name].yaml
        fields: dict[str, Any] = {}
        while True:  # the including file wins
            values = yaml.load(file.read_text().replace("!function", ""), Loader=yaml.BaseLoader)
            fields = {**values, **fields}
            if "include" not in values:
                break
            file = file.parent / values["include"]
        split = fields.get("test_split") or fields["validation_split"]
        assert (task.hub, task.config, task.split) == (fields["dataset_path"], fields.get("dataset_name"), split)
