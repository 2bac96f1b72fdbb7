"""Dialogues: the labels decode to every answer, with its ending, and to nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from resafe.data.chat import render
from resafe.data.items import Conversation, DialoguePair
from resafe.training.dpo import encode_pairs
from resafe.training.sft import encode_examples

HISTORY = (("user", "One?"), ("assistant", "Eins."))
TALK = Conversation("a", "Two?", "Zwei.", HISTORY, "Count.")


def learnt(tokenizer: Any, row: dict[str, list[int]]) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != -100]))


def test_all_answers_are_learnt_and_nothing_else(tokenizer: Any) -> None:
    rows, dropped = encode_examples(tokenizer, [TALK], "ignored: the row has its own", 512)
    assert dropped == 0
    text = tokenizer.decode(rows[0]["input_ids"])
    assert text == render(tokenizer, "Two?", "Count.", HISTORY) + "Zwei.</s>"
    assert learnt(tokenizer, rows[0]) == "Eins.</s>Zwei.</s>"
    at = [i for i, label in enumerate(rows[0]["labels"]) if label != -100]
    assert all(rows[0]["labels"][i] == rows[0]["input_ids"][i] for i in at)


def test_only_the_last_answer_where_the_template_rewrites_earlier_ones(tokenizer: Any) -> None:
    tokenizer.chat_template = (  # like Qwen3's: earlier answers lose a part
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] if loop.last or m['role'] != 'assistant' "
        "else m['content'][:2] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    rows, _ = encode_examples(tokenizer, [TALK], None, 512)
    assert "Ei</s>" in tokenizer.decode(rows[0]["input_ids"])
    assert learnt(tokenizer, rows[0]) == "Zwei.</s>"


def test_dialogues_are_cut_or_dropped(tokenizer: Any) -> None:
    first = len(tokenizer(render(tokenizer, "One?", "Count."))["input_ids"])
    rows, dropped = encode_examples(tokenizer, [TALK], None, first + 3)
    assert (dropped, learnt(tokenizer, rows[0])) == (0, "Ein")
    with pytest.raises(Exception, match="no example of 1"):
        encode_examples(tokenizer, [TALK], None, first)


def test_a_rows_system_turn_goes_before_the_runs(tokenizer: Any) -> None:
    alone = Conversation("b", "Two?", "Zwei.", (), "Count.")
    rows, _ = encode_examples(tokenizer, [alone], "Other.", 512)
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("<s>system\nCount.</s>")


def test_pairs_of_dialogues(tokenizer: Any) -> None:
    pair = DialoguePair("a", "Two?", "Zwei.", "Drei.", "safety", HISTORY, None)
    rows, _ = encode_pairs(tokenizer, [pair], "", 512)
    assert tokenizer.decode(rows[0]["prompt_ids"]) == render(tokenizer, "Two?", "", HISTORY)
    assert tokenizer.decode(rows[0]["rejected_ids"]) == "Drei.</s>"
