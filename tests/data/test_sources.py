"""Files and the Hub: the same rows either way, and messages that say where and what."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from resafe.data import load_set
from resafe.data.items import Example, Pair, Question
from resafe.data.registry import DataRegistry, items_digest
from resafe.data.sources import Row, read_file, read_hub
from resafe.errors import InputError

RAW = [
    {"prompt": "p1", "response_0": "no", "response_1": "yes", "is_response_0_safe": True, "is_response_1_safe": False},
    {
        "prompt": "p2",
        "response_0": "ok",
        "response_1": "no",
        "is_response_0_safe": "False",
        "is_response_1_safe": "True",
    },
    {"prompt": "p3", "response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": True},
    {"prompt": "p1", "response_0": "yes", "response_1": "no", "is_response_0_safe": 0, "is_response_1_safe": 1},
    {"prompt": "p4", "response_0": " ", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": False},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    return path


def use_hub(monkeypatch: pytest.MonkeyPatch, rows: Any, calls: list[Any] | None = None) -> None:
    import datasets

    def load(name: str, config: str | None, *, split: str, revision: str | None) -> Any:
        if calls is not None:
            calls.append((name, config, split, revision))
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_pairs_of_which_exactly_one_is_safe(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pku_saferlhf" / "raw_columns_rebuilt2000.jsonl", RAW)
    loaded = load_set("pku_saferlhf_raw", data_dir=tmp_path)
    assert [(p.prompt, p.chosen, p.rejected, p.side) for p in loaded.items if isinstance(p, Pair)] == [
        ("p1", "no", "yes", "safety"),
        ("p2", "no", "ok", "safety"),
    ]
    assert loaded.skipped == 3  # both safe, repeated with its responses swapped, empty response


def test_hub_and_file_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "pku_saferlhf" / "raw_columns_rebuilt2000.jsonl", RAW)
    calls: list[Any] = []
    use_hub(monkeypatch, RAW, calls)
    from_file = load_set("pku_saferlhf_raw", data_dir=tmp_path)
    from_hub = load_set("pku_saferlhf_raw", revision="abc")
    by_id = load_set("PKU-Alignment/PKU-SafeRLHF-10K")
    assert from_file.items == from_hub.items == by_id.items
    assert from_file.digest == from_hub.digest == by_id.digest
    assert calls[0] == ("PKU-Alignment/PKU-SafeRLHF-10K", None, "train", "abc")
    # another order is the same data; another word is not
    use_hub(monkeypatch, RAW[::-1])
    assert load_set("pku_saferlhf_raw").digest == from_file.digest
    use_hub(monkeypatch, [{**RAW[0], "prompt": "other"}, *RAW[1:]])
    assert load_set("pku_saferlhf_raw").digest != from_file.digest


def test_hub_columns_of_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "catqa" / "catqa_english.jsonl", [{"category": "A", "subcategory": "B", "prompt": "How?"}])
    use_hub(monkeypatch, [{"Category": "A", "Subcategory": "B", "Question": "How?"}])
    from_file, from_hub = load_set("catqa", data_dir=tmp_path), load_set("catqa")
    assert from_file.digest == from_hub.digest
    assert isinstance(from_hub.items[0], Question)
    assert (from_hub.items[0].topic, from_hub.items[0].metadata) == ("A/B", {"side": "harmful"})
    use_hub(monkeypatch, [{"topic": "A", "subtopic": "B", "question": "How?"}])
    assert load_set("harmfulqa").items[0].prompt == "How?"


def test_hub_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    use_hub(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(InputError, match=r"cannot load openai/gsm8k .*ConnectionError: no route\n.*--data-dir"):
        load_set("gsm8k")
    use_hub(monkeypatch, [])
    with pytest.raises(InputError, match="holds no rows"):
        read_hub("a/b", None, "test")
    use_hub(monkeypatch, [{"prompt": "x"}, {"promt": "x"}])
    with pytest.raises(InputError, match=r"BeaverTails-Evaluation, test row 0: there is no column 'category'"):
        load_set("beavertails")
    with pytest.raises(InputError, match="not on the Hub"):
        load_set("dangerousqa")


def test_xstest_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "xstest" / "xstest_prompts.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows(
            [
                ["id", "prompt", "type", "label", "focus", "note"],
                ["1", 'How, in "two lines",\nto kill a process?', "homonyms", "safe", "", ""],
                ["2", "How to kill a person?", "contrast_homonyms", "unsafe", "", ""],
            ]
        )
    both, safe = load_set("xstest", data_dir=tmp_path), load_set("xstest_safe", data_dir=tmp_path)
    unsafe = load_set("xstest_unsafe", data_dir=tmp_path)
    assert [q.metadata["side"] for q in both.items if isinstance(q, Question)] == ["harmless", "harmful"]
    assert (*safe.items, *unsafe.items) == both.items
    assert both.items[0].prompt.startswith('How, in "two lines",\nto kill')
    use_hub(monkeypatch, [{"prompt": "How to kill a person?", "type": "contrast_homonyms"}])  # no label there
    assert load_set("xstest").items == unsafe.items
    use_hub(monkeypatch, [{"prompt": "x", "type": "y", "label": "maybe"}])
    with pytest.raises(InputError, match="must be safe or unsafe"):
        load_set("xstest")


def test_alpaca_and_gsm8k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(
        monkeypatch,
        [
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            {"instruction": "Sing.", "input": "", "output": "La."},
            {"instruction": "Stop.", "input": "", "output": ""},
        ],
    )
    found = [(e.prompt, e.response) for e in load_set("alpaca_gpt4_en").items if isinstance(e, Example)]
    assert found == [("Add.\n\n1, 2", "3"), ("Sing.", "La.")]
    row = {"question": "How many?", "answer": "He has 500*2 = <<500*2=1000>>1000.\n#### 1,000"}
    use_hub(monkeypatch, [row])
    example, question = load_set("gsm8k_train").items[0], load_set("gsm8k").items[0]
    assert isinstance(example, Example)
    assert isinstance(question, Question)
    assert example.response == "He has 500*2 = 1000.\nThe answer is 1000."
    assert question.target == "1000"
    use_hub(monkeypatch, [{"question": "How many?", "answer": "None."}])
    with pytest.raises(InputError, match="does not end with '#### number'"):
        load_set("gsm8k")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', r"a\.jsonl, line 2: bad JSON"),
        ("a.jsonl", '{"prompt": "x"}\n\n["x"]\n', r"a\.jsonl, line 3: a row must be a JSON object, this is a list"),
        ("a.json", '[{"prompt": "x"},\n {"prompt": x}]', r"a\.json, line 2: bad JSON"),
        ("a.json", '{"prompt": "x"}', "must hold a list of objects"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.json", "", "holds no rows"),
        ("a.csv", "prompt\n", "holds no rows"),
        ("a.csv", "prompt,topic\nx\n", r"a\.csv, line 2: the row has not as many columns"),
        ("a.csv", "prompt,topic\nx,y,z\n", r"a\.csv, line 2: the row has not as many columns"),
        ("a.txt", "x", "the format '.txt' is not known"),
        ("a.jsonl", b"\xff\xfe", "byte 0 is not UTF-8"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_file(path)


def test_missing_file_and_column_name_the_nearest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a"}, {"promt": "x", "answer": "y"}])
    with pytest.raises(InputError, match=r"no file .*pair\.jsonl\ndid you mean 'pairs\.jsonl'\?"):
        load_set(str(tmp_path / "pair.jsonl"))
    with pytest.raises(InputError, match="no file") as caught:
        load_set("gsm8k", data_dir=tmp_path / "nowhere")
    assert caught.value.exit_code == 2
    assert caught.value.hint == "check the path"
    with pytest.raises(InputError) as caught:
        load_set(str(path))
    assert caught.value.message == "pairs.jsonl, line 2: there is no column 'prompt'"
    assert caught.value.hint == "did you mean 'promt'? its columns are: promt, answer"


def test_rows_check_their_values() -> None:
    row = Row({"a": 3, "b": " ", "c": "maybe", "d": " text "}, "f, line 1", {"x": "d"})
    assert row.text("x") == "text"
    assert row.has("x")
    assert not row.has("y")
    for call, message in (
        (lambda: row.text("a"), "column 'a' holds int, not text"),
        (lambda: row.text("b"), "column 'b' is empty"),
        (lambda: row.flag("c"), "column 'c' is 'maybe'"),
        (lambda: row.value("zzz"), "no column 'zzz'"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_a_users_own_files(tmp_path: Path) -> None:
    line_separator = "a\u2028b"  # legal inside a JSON string; must not end the line
    path = write_jsonl(tmp_path / "my.jsonl", [{"q": line_separator, "good": "g", "bad": "b"}])
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    pair = load_set(str(path), kind="pairs", columns=columns).items[0]
    assert isinstance(pair, Pair)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.side) == (line_separator, "g", "b", "safety")
    with pytest.raises(InputError, match="there is no column 'rejected'"):
        load_set(str(path), kind="pairs", columns={"prompt": "q", "chosen": "good"})
    table = tmp_path / "my.csv"
    table.write_text("\ufeffprompt,response,topic,side\nhello,hi,greeting,harmless\nhello,hi,greeting,harmless\n")
    loaded = load_set(str(table), kind="examples")
    assert [(e.prompt, e.response) for e in loaded.items if isinstance(e, Example)] == [("hello", "hi")]
    assert loaded.skipped == 1
    question = load_set(str(table)).items[0]
    assert isinstance(question, Question)
    assert (question.topic, question.metadata) == ("greeting", {"side": "harmless"})
    with pytest.raises(InputError, match="no kind 'texts'"):
        load_set(str(table), kind="texts")
    with pytest.raises(InputError, match="holds pairs, not questions"):
        load_set("pku_saferlhf", kind="questions", data_dir=tmp_path)


def test_filtered_layout_and_unusable_rows(tmp_path: Path) -> None:
    path = tmp_path / "pku_saferlhf" / "pku_seferlhf_realign_dpo_5k.json"
    path.parent.mkdir()
    path.write_text(json.dumps([{"prompt": "p", "response": ["safe", "less"]}]))
    pair = load_set("pku_saferlhf", data_dir=tmp_path).items[0]
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.rejected) == ("safe", "less")
    path.write_text(json.dumps([{"prompt": "p", "response": ["safe"]}]))
    with pytest.raises(InputError, match="must hold two texts"):
        load_set("pku_saferlhf", data_dir=tmp_path)
    path.write_text(json.dumps([RAW[2]]))
    with pytest.raises(InputError, match="none of the 1 rows can be used"):
        load_set("pku_saferlhf", data_dir=tmp_path)


def test_registry() -> None:
    registry = DataRegistry("resafe.no-such-group")
    fields = {"title": "t", "kind": "questions", "licence": "MIT", "file": "f.jsonl"}
    parse = registry.register("mine", hub="me/mine", **fields)(lambda row: None)
    assert registry.get("me/mine").parse is parse
    assert [source.name for source in registry] == ["mine"]
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("mine", **fields)(parse)
    with pytest.raises(InputError, match=r"no data set 'mime'\ndid you mean 'mine'\?"):
        registry.get("mime")


def test_digest_is_of_content() -> None:
    first, second = Example("a", "p", "r"), Example("b", "p", "r")
    assert items_digest([first, second]) == items_digest([second, first]) != items_digest([first])
    assert items_digest([Question("a", "p")]) != items_digest([Example("a", "p", "")])
