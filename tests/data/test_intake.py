"""Rows counted and named, streams of constant memory, LLaMA-Factory's file, overlap with evaluation sets."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from resafe.data.intake import IntakeReport
from resafe.data.intake_sources import load_training, stream_training
from resafe.data.items import Example
from resafe.data.overlap import EvaluationPrompts, evaluation_prompts, without_overlap
from resafe.errors import InputError

DATA = Path(os.environ.get("RESAFE_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}; set RESAFE_DATA_DIR")


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def good(n: int) -> dict[str, str]:
    return {"instruction": f"ask {n}", "output": f"answer {n}"}


def test_bad_rows_are_counted_and_named_with_their_lines(tmp_path: Path) -> None:
    rows = [
        good(0), "{broken", good(0), {"instruction": "a", "output": ""}, "[1]", "",
        {"messages": [{"role": "narrator", "content": "x"}]}, good(1),
    ]  # fmt: skip
    path = write(tmp_path / "mine.jsonl", rows)
    report = IntakeReport(path)
    items = list(stream_training(path, "examples", report=report))
    assert [item.prompt for item in items] == ["ask 0", "ask 1"]
    assert (report.rows, report.kept, report.repeated) == (7, 2, 1)
    assert report.bad == {"wrong schema": 2, "empty": 1, "unknown role": 1}
    places = [line.split(":")[0] for line in report.named["wrong schema"] + report.named["unknown role"]]
    assert places == ["mine.jsonl, line 2", "mine.jsonl, line 5", "mine.jsonl, line 7"]
    with pytest.raises(InputError, match=r"4 of 7 rows cannot be used \(1 empty, 1 unknown role, 2 wrong schema\)"):
        load_training(path, "examples", max_bad_share=0.5)
    assert len(load_training(path, "examples", max_bad_share=0.6).examples) == 2
    with pytest.raises(InputError, match="none of its 1 rows"):
        load_training(write(tmp_path / "b.jsonl", [{"text": "x"}]), "examples", max_bad_share=1.0)


def test_a_stream_takes_the_memory_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    with path.open("w") as stream:
        for n in range(3000):
            stream.write(json.dumps({"instruction": f"ask {n}", "output": f"{n} " + "x" * 5000}) + "\n")
    assert path.stat().st_size > 15_000_000
    tracemalloc.start()
    count = sum(1 for _ in stream_training(str(path), "examples"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert peak < 2_000_000  # ids of 3000 items, and a few rows


def test_json_lines_under_another_name_and_lists(tmp_path: Path) -> None:
    assert len(load_training(write(tmp_path / "a.json", [good(0), good(1)]), "examples").items) == 2
    (tmp_path / "b.json").write_text(json.dumps([good(0), good(1), good(2)], indent=1))
    assert len(load_training(str(tmp_path / "b.json"), "examples", limit=2).items) == 2
    (tmp_path / "c.csv").write_text("prompt,response\nq,a\nlonely\n")
    report = IntakeReport("c")
    assert len(list(stream_training(str(tmp_path / "c.csv"), "examples", report=report))) == 1
    assert report.named["wrong schema"] == ["c.csv, line 3: not as many columns as the header"]


INFO = {
    "plain": {"file_name": "plain.json", "file_sha1": "x"},
    "renamed": {"file_name": "renamed.jsonl", "columns": {"prompt": "q", "query": "more", "response": "a"}},
    "chat": {"file_name": "chat.jsonl", "formatting": "sharegpt", "num_samples": 1},
    "openai": {
        "file_name": "openai.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "client", "assistant_tag": "us"},
    },
    "better": {"file_name": "better.jsonl", "ranking": True, "columns": {"prompt": "q", "chosen": "up", "rejected": "down"}},  # noqa: E501
    "script": {"script_url": "belle"},
    "pictures": {"file_name": "p.json", "columns": {"images": "images"}},
    "typo": {"file_nam": "x.json"},
}  # fmt: skip


@pytest.fixture
def info(tmp_path: Path) -> str:
    (tmp_path / "plain.json").write_text(json.dumps([good(0)]))
    write(tmp_path / "renamed.jsonl", [{"q": "sum", "more": "1 2", "a": "3"}])
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    write(tmp_path / "chat.jsonl", [{"conversations": turns}, {"conversations": turns[:1]}])
    write(
        tmp_path / "openai.jsonl",
        [{"messages": [{"role": "client", "content": "hi"}, {"role": "us", "content": "yo"}]}],
    )
    write(tmp_path / "better.jsonl", [{"q": "sky", "up": "blue", "down": "red"}])
    return write(tmp_path / "dataset_info.json", [INFO])


@pytest.mark.parametrize(
    ("name", "prompt", "response"),
    [("plain", "ask 0", "answer 0"), ("renamed", "sum\n1 2", "3"), ("chat", "hi", "yo"), ("openai", "hi", "yo")],
)
def test_llamafactory_entries(info: str, name: str, prompt: str, response: str) -> None:
    (item,) = load_training(f"{info}:{name}", "examples").examples
    assert (item.prompt, item.response) == (prompt, response)


def test_llamafactory_ranking_and_refusals(info: str) -> None:
    (pair,) = load_training(f"{info}:better", "pairs").pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ("sky", "blue", "red")
    for name, kind, message in [
        ("better", "examples", "holds pairs"), ("plain", "pairs", "holds examples"), ("plan", "examples", "no entry"),
        ("script", "examples", "does not read script_url"), ("pictures", "examples", "text only"),
        ("typo", "examples", "unknown field 'file_nam'"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_training(f"{info}:{name}", kind)
    with pytest.raises(InputError, match="which entry"):
        load_training(info, "examples")


@needs_data
@pytest.mark.parametrize(
    ("name", "kind", "rows", "kept"),
    [  # rows as each SOURCE.md states them
        ("alpaca_gpt4_en", "examples", 999, 985), ("alpaca_gpt4_zh", "examples", 1000, 992),
        ("codealpaca", "examples", 2017, 2015), ("gsm8k", "examples", 7473, 7473),
        ("pku_saferlhf", "pairs", 5135, 3590), ("pku_saferlhf_raw", "pairs", 2000, 1734),
    ],
)  # fmt: skip
def test_published_sets(name: str, kind: str, rows: int, kept: int) -> None:
    report = load_training(name, kind, data_dir=DATA).report
    assert (report.rows, report.kept) == (rows, kept)


@needs_data
def test_genuine_raw_columns_keep_pairs_with_exactly_one_safe_answer() -> None:
    path = DATA / "pku_saferlhf" / "raw_columns_sample32.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    safer = {
        (row["prompt"].strip(), row[f"response_{row['safer_response_id']}"].strip())
        for row in rows
        if row["is_response_0_safe"] != row["is_response_1_safe"]
    }
    data = load_training(str(path), "pairs")
    assert {(pair.prompt, pair.chosen) for pair in data.pairs} == safer
    assert data.report.kept + data.report.unused == 32


def test_unknown_and_wrong_kinds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no training data 'alpaca_gpt4_em'") as caught:
        load_training("alpaca_gpt4_em", "examples")
    assert "alpaca_gpt4_en" in caught.value.hint
    with pytest.raises(InputError, match="holds pairs, not examples"):
        load_training("pku_saferlhf", "examples", data_dir=DATA)
    with pytest.raises(InputError, match="on the Hub only"):
        load_training("alpaca_hindi", "examples", data_dir=tmp_path)
    with pytest.raises(InputError, match="there is no file"):
        load_training(str(tmp_path / "none.jsonl"), "examples")


def test_overlap_is_dropped_and_reported_by_set() -> None:
    prompts = EvaluationPrompts({"what is 2 2": "sums", "who": "people"}, ("sums", "people"), ("far",))
    items = [Example("a", "What is 2+2?", "4"), Example("b", "Why?", "so"), Example("c", "WHO!", "me")]
    found = without_overlap(items, prompts)
    assert [item.id for item in found.kept] == ["b"]
    assert found.to_json() == {
        "dropped": 2, "by_set": {"sums": ["a"], "people": ["c"]},
        "compared_with": ["sums", "people"], "not_at_hand": ["far"],
    }  # fmt: skip


@needs_data
def test_gsm8k_test_questions_never_train() -> None:
    prompts = evaluation_prompts(DATA)
    assert {"gsm8k", "beavertails", "humaneval", "copa", "harmful", "arithmetic"} <= set(prompts.compared)
    test = [json.loads(line) for line in (DATA / "gsm8k/test.jsonl").read_text().splitlines()][:5]
    found = without_overlap([Example(str(n), row["question"], "?") for n, row in enumerate(test)], prompts)
    assert (found.kept, {name: len(ids) for name, ids in found.dropped.items()}) == ([], {"gsm8k": 5})
