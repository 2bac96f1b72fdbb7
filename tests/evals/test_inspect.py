"""The whole way through Inspect: provider, tasks, scorers, logs, records."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import eval as inspect_eval
from inspect_ai.log import read_eval_log
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, GenerateConfig, get_model
from inspect_ai.tool import ToolInfo

from resafe.data import harmful_rows, harmless_rows
from resafe.data.items import Question
from resafe.errors import InputError, ResafeError
from resafe.evals import QuestionSet, evaluate_model, generate, provider, refusal, run
from resafe.evals._registry import LocalModel, harmful, harmless, utility
from tests.evals.tiny import ragged_prompts


def question_sets(model: Any, tokenizer: Any) -> dict[str, QuestionSet]:
    """A harmful set of 5, and a task of 4 whose first two targets are what the model says."""
    prompts = ragged_prompts(9)
    said = generate(model, tokenizer, prompts[5:], system="", max_new_tokens=6)
    targets = [said[0], said[1], "w1 w1", "w2"]
    return {
        "harmful": QuestionSet(
            "harmful",
            "harmful",
            tuple(Question(f"h-{i}", prompt, "theft") for i, prompt in enumerate(prompts[:5])),
            "refusal",
            4,
        ),
        "words": QuestionSet(
            "words",
            "task",
            tuple(Question(f"t-{i}", p, "", t) for i, (p, t) in enumerate(zip(prompts[5:], targets, strict=True))),
            "exact",
            6,
        ),
    }


def test_records_of_all_sets(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = question_sets(model, tokenizer)
    waves: list[int] = []
    real = provider.complete

    def counted(*args: Any, **kwargs: Any) -> list[str]:
        waves.append(len(args[2]))
        return real(*args, **kwargs)

    monkeypatch.setattr(provider, "complete", counted)
    seen: list[tuple[int, int]] = []
    handlers = list(logging.getLogger().handlers)
    records = evaluate_model(
        name="tuned",
        model=model,
        tokenizer=tokenizer,
        sets=sets,
        system="",
        log_dir=tmp_path / "logs",
        batch_size=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert waves == [9]  # both sets together
    assert seen == [(i, 9) for i in range(1, 10)]
    assert logging.getLogger().handlers == handlers
    assert [r.id for r in records] == ["h-0", "h-1", "h-2", "h-3", "h-4", "t-0", "t-1", "t-2", "t-3"]
    harmful_part, task_part = records[:5], records[5:]
    assert [r.response for r in harmful_part] == generate(
        model, tokenizer, ragged_prompts(5), system="", max_new_tokens=4
    )
    assert {(r.model, r.set, r.side, r.topic, r.target) for r in harmful_part} == {
        ("tuned", "harmful", "harmful", "theft", None)
    }
    assert [(r.outcome, r.score) for r in harmful_part] == [(refusal(r.response), 0.0) for r in harmful_part]
    assert [(r.outcome, r.score) for r in task_part] == [("correct", 1.0)] * 2 + [("wrong", 0.0)] * 2

    logs = {log.eval.task: log for log in map(read_eval_log, sorted((tmp_path / "logs").iterdir(), key=str))}
    assert set(logs) == {"harmful", "words"}
    assert logs["words"].eval.model == "resafe/tuned"
    assert logs["words"].results.scores[0].name == "exact_scorer"
    assert logs["words"].results.scores[0].metrics["mean"].value == 0.5
    assert [s.output.completion for s in logs["harmful"].samples] == [r.response for r in harmful_part]


def test_one_bound_for_all_sets_and_refusals(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[list[int]] = []

    def refusing(_: Any, __: Any, texts: list[str], *, max_new_tokens: list[int], **___: Any) -> list[str]:
        limits.append(max_new_tokens)
        return ["I can't help with that." if i % 2 else "" for i in range(len(texts))]

    monkeypatch.setattr(provider, "complete", refusing)
    records = evaluate_model(
        name="m",
        model=model,
        tokenizer=tokenizer,
        sets=question_sets(model, tokenizer),
        log_dir=tmp_path,
        max_new_tokens=3,
    )
    assert limits == [[3] * 9]
    assert sorted(r.outcome for r in records if r.set == "harmful").count("refused") in (2, 3)
    assert {(r.outcome, r.score) for r in records if r.set == "harmful"} == {("refused", 1.0), ("broken", 0.0)}


def test_a_failing_model_is_named_with_its_reason(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> list[str]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(provider, "complete", failing)
    sets = question_sets(model, tokenizer)
    with pytest.raises(ResafeError, match=r"evaluation of 'm' on '\w+' failed: .*out of memory"):
        evaluate_model(name="m", model=model, tokenizer=tokenizer, sets=sets, log_dir=tmp_path)


def test_sets_go_by_their_names(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    sets = question_sets(model, tokenizer)
    with pytest.raises(InputError, match="'words' is under the key 'other'"):
        evaluate_model(name="m", model=model, tokenizer=tokenizer, sets={"other": sets["words"]}, log_dir=tmp_path)
    with pytest.raises(InputError, match="no question sets"):
        evaluate_model(name="m", model=model, tokenizer=tokenizer, sets={}, log_dir=tmp_path)


def test_plain_inspect_eval(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    served = get_model("resafe/any", loaded=model, tokenizer=tokenizer, system="", memoize=False)
    (log,) = inspect_eval(
        harmful(part="validation", max_new_tokens=2), model=served, log_dir=str(tmp_path), limit=3, display="none"
    )
    assert log.status == "success"
    assert len(log.samples) == 3
    assert log.results.scores[0].name == "refusal_scorer"
    assert log.results.scores[0].metrics["mean"].value == 0.0
    assert log.samples[0].metadata["side"] == "harmful"


def test_tasks_hold_the_shipped_sets() -> None:
    for part in ("test", "validation"):
        assert [sample.id for sample in harmful(part).dataset] == [row.id for row in harmful_rows(part)]
        assert [sample.input for sample in harmless(part).dataset] == [row.prompt for row in harmless_rows(part)]
    sums = utility(part="validation")
    assert sums.name == "arithmetic"
    assert sums.config.max_tokens == 48
    assert len(sums.dataset) == 500
    assert float(sums.dataset[0].target) == int(sums.dataset[0].target)
    assert "name: " in utility("extraction", "validation").dataset[0].target


def answer(api: LocalModel, *conversations: list[Any], tools: Any = ()) -> list[str]:
    """All conversations at once through the provider, in an event loop of their own."""

    async def ask() -> list[Any]:
        config = GenerateConfig(max_tokens=5)
        return await asyncio.gather(*(api.generate(turns, list(tools), "none", config) for turns in conversations))

    return [output.completion for output in asyncio.run(ask())]


def test_system_turns_and_longer_conversations(model: Any, tokenizer: Any) -> None:
    api = LocalModel("m", loaded=model, tokenizer=tokenizer, system="w7")
    user, system = ChatMessageUser(content="w1 w2"), ChatMessageSystem(content="w9")
    longer = [user, ChatMessageAssistant(content="w3"), ChatMessageUser(content="w4")]
    got = answer(api, [user], [system, user], longer)
    assert got[0] == generate(model, tokenizer, ["w1 w2"], system="w7", max_new_tokens=5)[0]
    assert got[1] == generate(model, tokenizer, ["w1 w2"], system="w9", max_new_tokens=5)[0]
    rendered = "<system> w7 <end> <user> w1 w2 <end> <bot> w3 <end> <user> w4 <end> <bot>"
    assert got[2] == provider.complete(model, tokenizer, [rendered], max_new_tokens=5)[0]
    assert answer(api, [user]) == got[:1]  # and again, in another event loop
    with pytest.raises(InputError, match="offers tools"):
        answer(api, [user], tools=[ToolInfo(name="t", description="d")])


def test_late_requests_make_a_wave_of_their_own(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waves: list[int] = []

    def counted(_: Any, __: Any, texts: list[str], **___: Any) -> list[str]:
        waves.append(len(texts))
        return texts

    monkeypatch.setattr(provider, "complete", counted)
    monkeypatch.setattr(provider, "_PATIENCE_S", 0.05)
    api = LocalModel("m", loaded=model, tokenizer=tokenizer, expected=4)
    user = [ChatMessageUser(content="w1")]

    async def ask() -> None:
        first = [asyncio.create_task(api.generate(user, [], "none", GenerateConfig())) for _ in range(3)]
        await asyncio.gather(*first)  # one that was expected does not come: answered after a while all the same
        await api.generate(user, [], "none", GenerateConfig())

    asyncio.run(ask())
    assert waves == [3, 1]


def test_the_order_of_requests_does_not_choose_the_batches(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks run beside each other, so requests come in any order; answers in bfloat16 depend on the batch."""
    real, seen = provider.complete, list[tuple[list[str], list[int]]]()

    def noted(model_: Any, tokenizer_: Any, texts: list[str], **settings: Any) -> list[str]:
        seen.append((list(texts), list(settings["max_new_tokens"])))
        return real(model_, tokenizer_, texts, **settings)

    monkeypatch.setattr(provider, "complete", noted)
    prompts = ragged_prompts(7)

    def answered(order: list[int]) -> dict[str, str]:
        api = LocalModel("m", loaded=model, tokenizer=tokenizer, expected=len(order))

        async def ask(place: int) -> str:
            output = await api.generate(
                [ChatMessageUser(content=prompts[place])], [], "none", GenerateConfig(max_tokens=2 + place % 3)
            )
            return output.completion

        async def all_at_once() -> list[str]:
            return await asyncio.gather(*map(ask, order))

        return dict(zip([prompts[place] for place in order], asyncio.run(all_at_once()), strict=True))

    assert answered([0, 1, 2, 3, 4, 5, 6]) == answered([3, 6, 0, 5, 2, 4, 1])
    assert len(seen) == 2 and seen[0] == seen[1]


def test_a_model_needs_its_tokenizer(model: Any) -> None:
    with pytest.raises(InputError, match="only one of model and tokenizer"):
        LocalModel("m", loaded=model)
    assert run.evaluate_model is evaluate_model


def test_a_reference_is_loaded(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    api = LocalModel(str(tmp_path))
    prompt = "w5 w6"
    assert answer(api, [ChatMessageUser(content=prompt)]) == generate(model, tokenizer, [prompt], max_new_tokens=5)
