"""Red-team wrappers: what the model gets, and that a prefilled answer is really continued."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import eval as inspect_eval
from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, GenerateConfig, get_model

from resafe.data.chat import render
from resafe.errors import InputError
from resafe.evals import _registry, complete  # noqa: F401  (what the entry point loads)
from resafe.evals.asking import _continuing
from resafe.evals.provider import LocalModel
from resafe.evals.wrappers import WRAPPERS, Wrapped, wrap


def test_every_wrapper_asks_the_question_last() -> None:
    names = [method.name for method in WRAPPERS]
    assert names == ["cot", "cou", "multi_turn", "none", "prefill", "role_play", "suffix"]
    for name in names:
        wrapped = wrap(name, "what is w1?")
        assert "what is w1?" in wrapped.turns[-1]
        assert bool(wrapped.prefill) == (name == "prefill")
        assert len(wrapped.turns) == (2 if name == "multi_turn" else 1)
    assert wrap("none", "q") == Wrapped(("q",))
    assert wrap("prefill", "q") == Wrapped(("q",), "Sure,")
    assert wrap("suffix", "q", text="Thanks.") == Wrapped(("q Thanks.",))
    with pytest.raises(InputError, match="did you mean 'suffix'"):
        wrap("sufix", "q")
    with pytest.raises(InputError, match="no setting 'word'"):
        wrap("suffix", "q", word="x")


def questions_file(place: Path, count: int = 5) -> Path:
    rows = [{"prompt": f"w{i} w{i + 1}", "topic": "a" if i % 2 else "b", "side": "harmful"} for i in range(count)]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def log_of(model: Any, tokenizer: Any, place: Path, wrapper: str, judges: str = "refusal") -> Any:
    served = get_model("resafe/any", loaded=model, tokenizer=tokenizer, memoize=False)
    (log,) = inspect_eval(
        "resafe/questions", model=served, log_dir=str(place / "logs"), display="none",
        task_args={
            "file": str(questions_file(place / "own.jsonl")), "max_new_tokens": 4, "wrapper": wrapper, "judges": judges,
        },
    )  # fmt: skip
    assert log.status == "success", log.error
    return log


def test_a_prefilled_answer_is_continued(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    log = log_of(model, tokenizer, tmp_path, "prefill")
    for sample in log.samples:
        text = render(tokenizer, sample.input) + "Sure,"
        rest = complete(model, tokenizer, [text], max_new_tokens=4, begun=["Sure,"])[0]
        assert sample.output.completion == "Sure," + rest
        assert [(m.role, m.text) for m in sample.messages] == [("user", sample.input), ("assistant", "Sure," + rest)]
        assert sample.metadata["topic"] in ("a", "b")


def test_several_turns_are_answered_in_turn(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    log = log_of(model, tokenizer, tmp_path, "multi_turn")
    opening = wrap("multi_turn", "x").turns[0]
    first = complete(model, tokenizer, [render(tokenizer, opening)], max_new_tokens=4)[0]
    for sample in log.samples:
        history = [("user", opening), ("assistant", first)]
        text = render(tokenizer, sample.input, None, history)
        assert sample.output.completion == complete(model, tokenizer, [text], max_new_tokens=4)[0]
        assert [m.role for m in sample.messages] == ["user", "assistant", "user", "assistant"]


def test_judges_are_scorers_by_name(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    log = log_of(model, tokenizer, tmp_path, "none", "refusal")
    assert [score.name for score in log.results.scores] == ["refusal"]
    assert all(sample.scores["refusal"].metadata["outcome"] in ("answered", "broken") for sample in log.samples)


def test_the_space_after_a_beginning_is_kept() -> None:
    """Decoded alone, sentencepiece tokens lose the space before their first word."""

    class Spaced:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1]}

        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join({1: "Sure,", 2: "here"}[token] for token in ids)

    import resafe.evals.generation as module

    def answered(*_: Any, **__: Any) -> list[list[int]]:
        return [[2], [2]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "complete_tokens", answered)
        patch.setattr(module, "_encode", lambda *_: [[1], [1]])
        assert module.complete(None, Spaced(), ["a", "b"], begun=["Sure,", ""]) == [" here", "here"]


def test_servers_are_told_to_continue() -> None:
    asked = {"extra_body": {"continue_final_message": True, "add_generation_prompt": False}}
    assert _continuing("vllm/org/model") == _continuing("openai-api/vllm/model") == asked
    assert _continuing("openai-api/other/model") == _continuing("resafe/x") == {}


def test_a_conversation_needs_a_user_turn(model: Any, tokenizer: Any) -> None:
    api = LocalModel("m", loaded=model, tokenizer=tokenizer)
    turns: list[Any] = [ChatMessageAssistant(content="w1")]
    with pytest.raises(InputError, match="no user turn"):
        asyncio.run(api.generate(turns, [], "none", GenerateConfig()))
    turns = [ChatMessageUser(content="w2"), ChatMessageAssistant(content="w1")]
    output = asyncio.run(api.generate(turns, [], "none", GenerateConfig(max_tokens=3)))
    rest = complete(model, tokenizer, [render(tokenizer, "w2") + "w1"], max_new_tokens=3)[0]
    assert output.completion == f" {rest}"  # the space belongs between the beginning and what follows


@pytest.mark.slow
def test_the_command_of_inspect(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """By entry point, as a user types it."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data" / "catqa").mkdir(parents=True)
    rows = [{"category": "c", "subcategory": s, "prompt": f"w1 {s}"} for s in ("w2", "w3")]
    (tmp_path / "data" / "catqa" / "catqa_english.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        sys.executable, "-m", "inspect_ai", "eval", "resafe/catqa", "--model", f"resafe/{tmp_path / 'model'}",
        "-T", f"data_dir={tmp_path / 'data'}", "-T", "wrapper=prefill", "-T", "judges=refusal", "-T",
        "max_new_tokens=3", "-M", "dtype=float32", "-M", f"store={tmp_path / 'store'}",
        "--log-dir", str(tmp_path / "logs"), "--display", "none",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    from inspect_ai.log import read_eval_log

    log = read_eval_log(str(next((tmp_path / "logs").glob("*.eval"))))
    assert log.status == "success"
    assert all(sample.output.completion.startswith("Sure,") for sample in log.samples)
    (stored,) = (tmp_path / "store").glob("*.jsonl")
    assert len(stored.read_text().splitlines()) == 2
