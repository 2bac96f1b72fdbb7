"""Stored responses: found again, never made twice, and whole after a real kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.model import ChatMessageUser, GenerateConfig

from resafe.errors import InputError
from resafe.evals import provider
from resafe.evals.provider import LocalModel
from resafe.evals.responses import Decoding, ResponseStore
from resafe.evals.safety import SafetySettings, evaluate_safety, subjects
from tests.evals.tiny import ragged_prompts

COUNT = 24
SLOW = """
import sys, time
from resafe.evals.responses import ResponseStore
from resafe.evals.safety import SafetySettings, evaluate_safety, subjects
put = ResponseStore.put
def slowly(self, key, response):
    put(self, key, response)
    time.sleep(0.1)
ResponseStore.put = slowly
model, file, store = sys.argv[1:]
from pathlib import Path
evaluate_safety(subjects([model]), SafetySettings(
    sets=(file,), max_new_tokens=6, dtype="float32", batch_size=4, store=Path(store)))
"""


def test_a_response_by_what_it_depends_on(tmp_path: Path) -> None:
    with ResponseStore(tmp_path, "a" * 64) as store:
        greedy = Decoding(8, "float32")
        key = store.key("text", greedy)
        assert store.get(key) is None
        store.put(key, "first")
        store.put(key, "second")
        assert store.get(key) == "first"
        assert key == store.key("text", Decoding(8, "float32", 0.0, 5, 0.5, 3))  # greedy takes no notice of these
        others = {
            store.key("text ", greedy), store.key("text", Decoding(9, "float32")),
            store.key("text", Decoding(8, "bfloat16")), store.key("text", Decoding(8, "float32", 1.0)),
            store.key("text", Decoding(8, "float32", 1.0, seed=1)),
        }  # fmt: skip
        assert len(others | {key}) == 6
        with pytest.raises(InputError, match="another process is answering"):
            ResponseStore(tmp_path, "a" * 64)
    with ResponseStore(tmp_path, "a" * 64) as again, ResponseStore(tmp_path, "b" * 64) as other:
        assert again.get(key) == "first"
        assert other.get(other.key("text", greedy)) is None
        again.path.write_text(again.path.read_text() + '{"key": "torn')
    with ResponseStore(tmp_path, "a" * 64) as torn:
        torn.put("k" * 64, "whole")
    with ResponseStore(tmp_path, "a" * 64) as last:
        assert (last.get(key), last.get("k" * 64)) == ("first", "whole")


def test_where_a_model_stops_is_part_of_its_key(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from resafe.checkpoints import open_checkpoint
    from resafe.evals.responses import speaker_digest

    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    before = open_checkpoint(tmp_path / "m")
    found = speaker_digest(before)
    settings = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 5}))
    after = open_checkpoint(tmp_path / "m")
    assert after.digest == before.digest and speaker_digest(after) != found


def answers(api: LocalModel, prompts: list[str]) -> list[str]:
    async def ask() -> list[Any]:
        config = GenerateConfig(max_tokens=5)
        return await asyncio.gather(
            *(api.generate([ChatMessageUser(content=prompt)], [], "none", config) for prompt in prompts)
        )

    return [output.completion for output in asyncio.run(ask())]


@pytest.mark.parametrize("whole", [False, True])
def test_only_what_is_missing_is_decoded(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    prompts = ragged_prompts(8)
    decoded: list[int] = []
    real = provider.complete

    def counted(*args: Any, **settings: Any) -> list[str]:
        each = settings.pop("each")

        def noted(index: int, text: str) -> None:
            decoded.append(index)
            each(index, text)

        return real(*args, each=noted, **settings)

    monkeypatch.setattr(provider, "complete", counted)

    def asked(some: list[str], store: ResponseStore | None) -> list[str]:
        decoded.clear()
        common = {"batch_size": 4, "expected": len(some), "precision": "float32", "whole_batches": whole}
        return answers(LocalModel("m", loaded=model, tokenizer=tokenizer, store=store, **common), some)

    fresh = asked(prompts, None)
    with ResponseStore(tmp_path, "c" * 64) as store:
        longest = sorted(prompts, key=lambda text: -len(text))[:5]
        asked(longest, store)
        assert len(decoded) == 5
        assert asked(prompts, store) == fresh
        # 8 rows are two batches of 4 by length, and the second holds all that is missing and one more
        assert len(decoded) == (4 if whole else 3)
        assert asked(prompts, store) == fresh
        assert decoded == []
        lazily = LocalModel("m", load=lambda: 1 / 0, tokenizer=tokenizer, store=store, precision="float32")
        assert answers(lazily, prompts) == fresh  # no model is loaded
        assert answers(lazily, [prompts[0], prompts[0]]) == [fresh[0]] * 2


def test_equal_requests_are_answered_once(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with ResponseStore(tmp_path, "d" * 64) as store:
        api = LocalModel("m", loaded=model, tokenizer=tokenizer, store=store, precision="float32", expected=3)
        found = answers(api, ["w1 w2", "w3", "w1 w2"])
        assert found[0] == found[2]
        assert len(store.path.read_text().splitlines()) == 2


@pytest.mark.slow
def test_killed_and_resumed(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ragged_prompts(COUNT)))
    command = [sys.executable, "-c", SLOW, str(tmp_path / "model"), str(file), str(tmp_path / "store")]
    process = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(rows(tmp_path / "store")) < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = rows(tmp_path / "store")
    assert 6 <= len(before) < COUNT
    found = {}
    for store in ("store", "fresh"):
        settings = SafetySettings(
            sets=(str(file),), max_new_tokens=6, dtype="float32", batch_size=4, store=tmp_path / store
        )
        result = evaluate_safety(subjects([str(tmp_path / "model")]), settings)
        assert result.reused == (len(before) if store == "store" else 0)
        found[store] = [answer.response for answer in result.answers]
    assert found["store"] == found["fresh"]
    after = rows(tmp_path / "store")
    assert after[: len(before)] == before  # none is lost or written again
    assert len({row["key"] for row in after}) == len(after) == len(rows(tmp_path / "fresh"))
    assert sorted(row["response"] for row in after) == sorted(row["response"] for row in rows(tmp_path / "fresh"))


def rows(store: Path) -> list[dict[str, Any]]:
    files = list(store.glob("*.jsonl")) if store.is_dir() else []
    return [json.loads(line) for file in files for line in file.read_text().split("\n")[:-1]]
