"""Every format a user's row may be in, read to the same example; what is wrong is named."""

from __future__ import annotations

from typing import Any

import pytest

from resafe.data.formats import Layout, RowError, example_of, pair_of
from resafe.data.items import Conversation, DialoguePair

HISTORY = (("user", "one"), ("assistant", "1"))


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "two", "input": "", "output": "2", "history": [["one", "1"]], "system": "count"},
        {"messages": [{"role": r, "content": c} for r, c in [("system", "count"), *HISTORY, ("user", "two"), ("assistant", "2")]]},  # noqa: E501
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "1"}, {"from": "human", "value": "two"}, {"from": "gpt", "value": "2"}], "system": "count"},  # noqa: E501
    ],
    ids=["alpaca", "messages", "sharegpt"],
)  # fmt: skip
def test_formats_give_the_same_conversation(row: dict[str, Any]) -> None:
    item = example_of(row)
    assert isinstance(item, Conversation)
    assert (item.system, item.history, item.prompt, item.response) == ("count", HISTORY, "two", "2")
    assert item.id == example_of(row | {"unrelated": 1}).id


def test_single_turns_are_plain_examples() -> None:
    item = example_of({"instruction": " Add ", "input": "1, 2", "output": "3"})
    assert type(item).__name__ == "Example"
    assert (item.prompt, item.response) == ("Add\n\n1, 2", "3")
    parts = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "yo"},
        ]
    }
    assert example_of(parts).prompt == "hi"
    dangling = {"messages": [*({"role": r, "content": c} for r, c in HISTORY), {"role": "user", "content": "two"}]}
    assert example_of(dangling).response == "1"


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"instruction": "a", "output": " "}, "empty", "answer is empty"),
        ({"instruction": "", "output": "b"}, "empty", "prompt is empty"),
        ({"text": "a"}, "wrong schema", "no prompt among the columns: text"),
        ({"instruction": "a"}, "wrong schema", "answer is missing"),
        ({"instruction": "a", "output": 3}, "wrong schema", "int, not text"),
        ({"messages": []}, "empty", "no turns"),
        ({"messages": "hello"}, "wrong schema", "str, not a list"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "unknown role", "'narrator'"),
        ({"messages": [{"content": "a"}]}, "wrong schema", "role None"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "wrong schema", "turn 2"),
        ({"messages": [{"role": "user", "content": "a"}]}, "empty", "no answer"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "wrong schema", "pairs"),
    ],
)
def test_bad_rows_are_told_apart(row: dict[str, Any], reason: str, words: str) -> None:
    with pytest.raises(RowError) as caught:
        example_of(row)
    assert caught.value.reason == reason
    assert words in caught.value.detail


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "sky?", "chosen": "blue", "rejected": "red"},
        {"prompt": [user("sky?")], "chosen": [bot("blue")], "rejected": [bot("red")]},
        {"chosen": [user("sky?"), bot("blue")], "rejected": [user("sky?"), bot("red")]},
        {"prompt": "sky?", "chosen": [user("sky?"), bot("blue")], "rejected": [user("sky?"), bot("red")]},
        {"chosen": "sky? blue", "rejected": "sky? red"},
        {"instruction": "sky?", "output": ["blue", "red"]},
        {"conversations": [{"from": "human", "value": "sky?"}], "chosen": {"from": "gpt", "value": "blue"}, "rejected": {"from": "gpt", "value": "red"}},  # noqa: E501
        {"chosen": "\n\nHuman: sky?\n\nAssistant: blue", "rejected": "\n\nHuman: sky?\n\nAssistant: red"},
    ],
    ids=["plain", "turns", "implicit", "ultrafeedback", "implicit-text", "alpaca-ranking", "sharegpt-ranking", "hh"],
)  # fmt: skip
def test_preference_formats_give_the_same_pair(row: dict[str, Any]) -> None:
    pair = pair_of(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("sky?", "blue", "red")


def test_dialogues_keep_their_history() -> None:
    start = "\n\nHuman: one\n\nAssistant: 1\n\nHuman: two\n\nAssistant:"
    pair = pair_of({"chosen": f"{start} 2", "rejected": f"{start} 3"})
    assert isinstance(pair, DialoguePair)
    assert (pair.history, pair.prompt, pair.chosen, pair.rejected) == (HISTORY, "two", "2", "3")
    with pytest.raises(RowError, match="differ before"):
        pair_of({"chosen": f"{start} 2", "rejected": "\n\nHuman: one\n\nAssistant: 3"})
    with pytest.raises(RowError, match="the same"):
        pair_of({"prompt": "a", "chosen": "b", "rejected": "b"})
    with pytest.raises(RowError, match="no columns 'chosen' and 'rejected'"):
        pair_of({"prompt": "a", "completion": "b", "label": True})


def test_layout_names_columns_tags_and_roles() -> None:
    layout = Layout({"messages": "talk"}, "who", "says", {"A": "user", "B": "assistant"})
    row = {"talk": [{"who": "A", "says": "hi"}, {"who": "B", "says": "yo"}]}
    assert example_of(row, "x", layout).response == "yo"
    renamed = Layout({"instruction": "question", "output": "reply", "system": "persona"})
    item = example_of({"question": "q", "reply": "r", "persona": "p"}, "x", renamed)
    assert isinstance(item, Conversation)
    assert item.system == "p"
