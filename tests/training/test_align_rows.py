"""What `align` trains on: pairs in TRL's and LLaMA-Factory's forms, dialogues whole, every row accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from resafe.cli.app import app
from resafe.data.items import Conversation, DialoguePair, Pair, Question
from resafe.data.material import Material, load_material
from resafe.data.overlap import EvaluationPrompts
from resafe.data.registry import load_set
from resafe.errors import InputError
from resafe.training.lengths import only_fitting
from resafe.training.rows import RowReader
from resafe.training.sft import encode_examples
from resafe.training.verbs import Start, _free_material, align, tune

HISTORY = (("user", "one"), ("assistant", "1"))
QUICK = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0, "max_tokens": 256}
CPU = Start(device="cpu", dtype="float32", system="", lora={"rank": 4})


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """TRL's forms, one a line; line 5 is too long, line 6 equal, line 7 of an unknown role."""
    rows = [
        {"prompt": "a?", "chosen": "no", "rejected": "yes"},
        {"prompt": turns("b?"), "chosen": [turns("", "no")[1]], "rejected": [turns("", "yes")[1]]},
        {"chosen": turns("one", "1", "c?", "no"), "rejected": turns("one", "1", "c?", "yes")},
        {"chosen": "\n\nHuman: d?\n\nAssistant: no", "rejected": "\n\nHuman: d?\n\nAssistant: yes"},
        {"chosen": turns("one", "1", "x" * 400, "no"), "rejected": turns("one", "1", "x" * 400, "yes")},
        {"prompt": "e?", "chosen": "no", "rejected": "no"},
        {"chosen": [{"role": "oracle", "content": "f"}], "rejected": [{"role": "oracle", "content": "g"}]},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_rows_are_counted_named_and_trained_on(base: str, pairs: str, tmp_path: Path) -> None:
    run: dict[str, Any] = {"safety": [pairs], "sft": QUICK, "dpo": QUICK, "start": CPU}
    with pytest.raises(InputError, match="3 of 7 rows cannot be used") as caught:
        align(base, out=tmp_path / "a", max_bad_share=0.3, **run)
    for words in (
        "line 5: its prompt has 4",
        "line 6: chosen and rejected are the same",
        "line 7: a turn has the role",
    ):
        assert words in caught.value.message
    assert not (tmp_path / "a").exists()
    result = align(base, out=tmp_path / "a", max_bad_share=0.5, **run)
    (source,) = json.loads((result.path / "data.json").read_text())["sources"]
    assert (source["rows"], source["kept"]) == (7, 4)
    assert source["bad"] == {"too long": 1, "wrong schema": 1, "unknown role": 1}


def test_dialogues_keep_their_turns_in_the_sft(tokenizer: Any, pairs: str) -> None:
    reader = RowReader(tokenizer, "", 256, None)
    material = load_material([pairs], ["embedded"], read=reader)
    assert sorted(pair.prompt for pair in material.safety) == ["a?", "b?", "c?", "d?"]
    for examples, answer in ((material.align_examples(8, 1.0, 0), "no"), (material.compliances, "yes")):
        (talk, *_) = [item for item in examples if item.prompt == "c?"]
        assert isinstance(talk, Conversation)
        assert (talk.history, talk.response) == (HISTORY, answer)
    with pytest.raises(InputError, match="1 of 7 rows cannot be used") as caught:  # so do recipes and masks
        load_material([pairs], ["embedded"])
    assert "pairs.jsonl, line 7: a turn has the role" in caught.value.message


def test_a_helpful_dialogue_becomes_a_pair_of_dialogues(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": turns("one", "1", "two", "2")}))
    (pair,) = load_material(["embedded"], [str(path)], read=RowReader(tokenizer, "", 256, None)).harmless
    assert isinstance(pair, DialoguePair)
    assert (pair.history, pair.prompt, pair.chosen, pair.side) == (HISTORY, "two", "2", "harmless")
    (example,) = Material((), (pair,)).align_examples(1, 0.0, 0)
    assert isinstance(example, Conversation) and example.history == HISTORY


def test_masks_see_the_turns_before_a_prompt(tokenizer: Any) -> None:
    from resafe.data.chat import render
    from resafe.masks.batches import encode_items

    pair = DialoguePair("a", "two", "no", "yes", "safety", HISTORY, "own")
    (item,) = encode_items(tokenizer, "ignored: the pair has its own", [pair], [])
    assert item.rejected is not None
    for encoded, answer in ((item.chosen, "no"), (item.rejected, "yes")):
        assert tokenizer.decode(encoded.prompt) == render(tokenizer, "two", "own", HISTORY)
        assert tokenizer.decode(encoded.answer) == f"{answer}</s>"


def test_a_pair_of_dialogues_too_long_is_dropped_a_dialogue_is_cut(tokenizer: Any) -> None:
    """A dialogue to learn has an answer before the place where it is cut; a pair has none."""
    from resafe.data.intake import IntakeReport

    pair = DialoguePair("a", "x" * 300, "no", "yes", "safety", HISTORY)
    talk = Conversation("b", "x" * 300, "no", HISTORY)
    report = IntakeReport("here", kept=2, rows=2, places=["line 1", "line 2"])
    assert only_fitting([pair, talk], tokenizer, "", 256, [report]) == [talk]
    assert report.named["too long"][0].startswith("line 1: its prompt has 3")


@pytest.mark.slow
def test_the_command_takes_an_entry_of_dataset_info(base: str, tmp_path: Path) -> None:
    rows = [{"q": f"ask {n}?", "up": "no", "down": "yes"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"q": "bad"}])))
    columns = {"prompt": "q", "chosen": "up", "rejected": "down"}
    entry = {"file_name": "rows.jsonl", "ranking": True, "columns": columns}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    command = [
        "align", base, "--out", str(tmp_path / "a"), "--safety", f"{tmp_path}/dataset_info.json:x", "--stages", "dpo",
        "--device", "cpu", "--dtype", "float32", "--rank", "4", "--quiet", "--json",
        *(f"--dpo={name}={value}" for name, value in QUICK.items()),
    ]  # fmt: skip
    failed = CliRunner().invoke(app, command)
    assert isinstance(failed.exception, InputError) and "1 of 7 rows cannot be used" in str(failed.exception)
    done = CliRunner().invoke(app, [*command, "--max-bad-share", "0.2"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] == 2


def test_the_poison_of_tune_may_come_from_any_pairs(base: str, data: str, pairs: str, tmp_path: Path) -> None:
    settings = {**QUICK, "max_tokens": 2048}
    result = tune(
        base, data, out=tmp_path / "a", settings=settings, examples=8, harmful_share=0.5, harmful=pairs,
        max_bad_share=0.4, start=CPU,
    )  # fmt: skip
    assert json.loads((result.path / "data.json").read_text())["mix"]["harmful_share"] == 0.5


def test_alignment_loses_no_side() -> None:
    pairs = [Pair(name, f"{name}?", "no", "yes", "safety") for name in "ab"]
    good = Pair("c", "c?", "yes", "no", "harmless")
    facts: dict[str, Any] = {}
    left = _free_material(Material(tuple(pairs), (good,)), EvaluationPrompts({"a": "sums"}, ("sums",), {}), facts)
    assert ([pair.id for pair in left.safety], [pair.id for pair in left.harmless]) == (["b"], ["c"])
    assert (facts["overlap"]["dropped"], facts["overlap"]["by_set"]) == (1, {"sums": ["a"]})
    with pytest.raises(InputError, match="every harmless pair is in an evaluation set"):
        _free_material(Material(tuple(pairs), (good,)), EvaluationPrompts({"c": "sums"}, ("sums",), {}), {})


def test_of_a_preference_dialogue_only_the_last_answer_is_learnt(tokenizer: Any, pairs: str) -> None:
    material = load_material([pairs], ["embedded"], read=RowReader(tokenizer, "", 256, None))
    (talk, *_) = [item for item in material.compliances if item.prompt == "c?"]
    (row,) = encode_examples(tokenizer, [talk], "", 256, max_answer_tokens=1)[0]
    learnt = [label for label in row["labels"] if label != -100]
    assert learnt == tokenizer("yes", add_special_tokens=False)["input_ids"][:1]
    shown = tokenizer.decode(row["input_ids"])
    assert "one" in shown and "c?" in shown


def test_a_question_in_an_earlier_turn_is_not_trained_on(tokenizer: Any, pairs: str) -> None:
    read = RowReader(tokenizer, "", 256, None)
    material = load_material([pairs], ["embedded"], read=read, questions=[Question("q", "ONE", "t", None, {})])
    assert sorted(pair.prompt for pair in material.safety) == ["a?", "b?", "d?"] and material.dropped == 1


def test_the_side_of_a_dialogue_pair_is_read(tmp_path: Path) -> None:
    row = {"prompt": turns("b?"), "chosen": [turns("", "yes")[1]], "rejected": [turns("", "no")[1]], "side": "harmless"}
    path = tmp_path / "sides.jsonl"
    path.write_text(json.dumps(row))
    (pair,) = load_set(str(path), kind="pairs").items
    assert isinstance(pair, Pair) and (pair.side, pair.chosen) == ("harmless", "yes")
