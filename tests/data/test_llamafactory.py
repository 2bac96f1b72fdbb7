"""LLaMA-Factory's `dataset_info.json`: every option as that tool reads it, and what resafe cannot train on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resafe.data.intake import IntakeReport
from resafe.data.intake_sources import load_training, stream_training
from resafe.data.items import Conversation, DialoguePair
from resafe.data.llamafactory import read_entry
from resafe.errors import InputError

Info = Callable[..., str]
TURNS = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "1"}, {"from": "human", "value": "two"}]
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


@pytest.fixture
def info(tmp_path: Path) -> Info:
    """Writes rows and an entry "x" for them, and gives the reference."""

    def make(entry: dict[str, Any], *rows: dict[str, Any], file: str = "rows.jsonl") -> str:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        path = tmp_path / "dataset_info.json"
        path.write_text(json.dumps({"x": {"file_name": file, **entry}}), encoding="utf-8")
        return f"{path}:x"

    return make


@pytest.mark.parametrize(
    ("entry", "row", "prompt"),
    [
        ({}, {"instruction": "add", "input": "1 2"}, "add\n1 2"),  # one line break, as converter.py joins them
        ({"columns": {"prompt": "input", "response": "output"}}, {"input": "add"}, "add"),  # its entry "firefly"
        ({"columns": {"prompt": "instruction", "query": "", "response": "output"}},
         {"instruction": "add", "input": "not read"}, "add"),
        ({}, {"instruction": "add", "system": "not read", "history": [["not", "read"]]}, "add"),
        ({"note": "the user's own", "columns": {"prompt": "instruction", "response": "output", "mine": "m"}},
         {"instruction": "add", "m": 1}, "add"),
    ],
    ids=["joined", "prompt-named-input", "query-off", "system-and-history-unnamed", "unknown-names-passed-over"],
)  # fmt: skip
def test_only_the_named_columns_are_read(info: Info, entry: dict[str, Any], row: dict[str, Any], prompt: str) -> None:
    (item,) = load_training(info(entry, {**row, "output": "3"}), "examples").examples
    assert (type(item).__name__, item.prompt, item.response) == ("Example", prompt, "3")


def test_system_and_history_where_they_are_named(info: Info) -> None:
    columns = {"prompt": "q", "query": "more", "response": "a", "system": "persona", "history": "before"}
    row = {"q": "two", "more": "now", "a": "2", "persona": "count", "before": [["one", "1"]]}
    (item,) = load_training(info({"columns": columns}, row), "examples").examples
    assert isinstance(item, Conversation)
    assert (item.system, item.history, item.prompt) == ("count", (("user", "one"), ("assistant", "1")), "two\nnow")


def test_sharegpt_system_column_and_system_turn(info: Info) -> None:
    entry = {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "persona", "tools": "t"}}
    answered = [*TURNS, {"from": "gpt", "value": "2"}]
    own = [{"from": "system", "value": "turn"}, *answered]
    reference = info(entry, {"conversations": answered, "persona": "column"}, {"conversations": own, "persona": "no"})
    items = load_training(reference, "examples").examples
    assert [item.system for item in items if isinstance(item, Conversation)] == ["column", "turn"]
    renamed = {**entry, "tags": {**OPENAI_TAGS, "system_tag": "boss"}}
    talk = [{"role": "boss", "content": "turn"}, {"role": "user", "content": "hi"}]
    (item,) = load_training(
        info(renamed, {"conversations": [*talk, {"role": "assistant", "content": "yo"}]}), "examples"
    ).examples
    assert isinstance(item, Conversation) and (item.system, item.prompt, item.response) == ("turn", "hi", "yo")


def test_openai_formatting_needs_no_tags(info: Info) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (item,) = load_training(info({"formatting": "openai"}, {"messages": turns}), "examples").examples
    assert (item.prompt, item.response) == ("hi", "yo")


def test_ranking_in_both_formats(info: Info) -> None:
    columns = {"prompt": "question", "chosen": "up", "rejected": "down", "system": "system"}  # its entry "orca_pairs"
    row = {"question": "sky", "up": "blue", "down": "red", "system": "be brief", "input": "not read"}
    (pair,) = load_training(info({"ranking": True, "columns": columns}, row), "pairs").pairs
    assert isinstance(pair, DialoguePair)
    assert (pair.system, pair.prompt, pair.chosen, pair.rejected) == ("be brief", "sky", "blue", "red")
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    row = {"conversations": TURNS, "chosen": {"from": "gpt", "value": "2"}, "rejected": {"from": "gpt", "value": "3"}}
    (pair,) = load_training(info({"ranking": True, "formatting": "sharegpt", "columns": columns}, row), "pairs").pairs
    assert isinstance(pair, DialoguePair)
    assert (pair.history, pair.prompt, pair.rejected) == ((("user", "one"), ("assistant", "1")), "two", "3")


def test_turns_of_tools_are_named_as_unknown_roles(info: Info) -> None:
    turns = [TURNS[0], {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "1"}, TURNS[1]]
    reference = info({"formatting": "sharegpt"}, {"conversations": TURNS[:2]}, {"conversations": turns})
    report = IntakeReport(reference)
    assert len(list(stream_training(reference, "examples", report=report))) == 1
    assert report.named == {"unknown role": ["rows.jsonl, line 2: a turn has the role 'function_call'"]}


def test_a_folder_of_files_and_parquet(info: Info, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"instruction": f"ask {n}", "output": f"{n}"} for n in range(300)]
    reference = info({"file_name": "parts"}, *rows[:2], file="parts/b.jsonl")
    (tmp_path / "parts" / "a.jsonl").write_text(json.dumps(rows[2]))
    assert [item.response for item in load_training(reference, "examples").examples] == ["2", "0", "1"]
    assert len(load_training(str(tmp_path / "parts"), "examples").items) == 3  # also without an entry
    (tmp_path / "parts" / "c.csv").write_text("instruction,output\nq,a\n")
    with pytest.raises(InputError, match=r"files of several formats: \.csv, \.jsonl"):
        load_training(reference, "examples")
    parquet.write_table(
        pyarrow.Table.from_pylist([*rows, {"instruction": "q", "output": None}]), tmp_path / "p.parquet"
    )
    data = load_training(info({"file_name": "p.parquet", "num_samples": 301}), "examples")
    assert [item.response for item in data.examples] == [row["output"] for row in rows]
    assert data.report.named == {"wrong schema": ["p.parquet, row 301: the answer is missing"]}
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="broken.parquet: not a Parquet file"):
        load_training(str(tmp_path / "broken.parquet"), "examples")


def test_hub_fields_arrive(tmp_path: Path) -> None:
    path = tmp_path / "dataset_info.json"
    entry = {
        "hf_hub_url": "a/b", "file_name": "ignored.json", "subset": "en", "split": "validation", "folder": "part",
        "revision": "v1", "num_samples": 5,
    }  # fmt: skip
    path.write_text(json.dumps({"x": entry}))
    found = read_entry(path, "x")
    assert (found.file, found.hub, found.subset, found.split) == (None, "a/b", "en", "validation")
    assert (found.folder, found.revision, found.limit) == ("part", "v1", 5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"columns": {"prompt": "p", "response": "a", "kto_tag": "label"}}, "rated one by one"),
        ({"formatting": "sharegpt", "columns": {"messages": "m", "kto_tag": "label"}}, "rated one by one"),
        ({"columns": {"prompt": "text"}}, "pre-training"),
        ({"columns": {"promt": "text"}}, "unknown column 'promt'\ndid you mean 'prompt'"),
        ({"formatting": "sharegpt", "tags": {"user_tg": "u"}}, "unknown tag 'user_tg'\ndid you mean 'user_tag'"),
        ({"formatting": "sharegpt", "columns": {"messages": "m", "videos": "v"}}, "column 'videos'.*text only"),
        ({"formatting": "chatml"}, "formatting is 'chatml'\n.*'alpaca', 'sharegpt' or 'openai'"),
        ({"num_samples": "many"}, "num_samples is 'many'"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"columns": ["prompt"]}, r"columns is \['prompt'\]"),
        ({"columns": {"prompt": 3}}, "columns.prompt is 3"),
        ({"ranking": "perhaps"}, "ranking is 'perhaps'"),
        ({"file_name": None, "ms_hub_url": "a/b"}, "does not read ms_hub_url"),
        ({"file_name": "none.txt"}, "there is no file"),
        ({"file_name": "rows.txt"}, "format '.txt' is not known"),
    ],
)
def test_what_cannot_be_read_is_said(info: Info, tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    reference = info(entry, {"instruction": "a", "output": "b"})
    (tmp_path / "rows.txt").write_text("text")
    with pytest.raises(InputError, match=message):
        load_training(reference, "examples")
