"""Answers to requests that come without: what the model itself says before it is aligned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.data.items import Pair, Question
from resafe.data.pairs import short_refusal
from resafe.evals import generate
from resafe.provenance import digest_value
from resafe.recipe.stage import write_json

if TYPE_CHECKING:
    from resafe.recipe.context import Context

MAX_NEW_TOKENS = 40


def own_answers(context: Context, questions: Sequence[Question]) -> list[Pair]:
    """Pairs of the questions; the answers are a stage of the run.

    A chat model that was never taught to refuse answers everything, and in its own words, so training on them moves
    nothing but the decision whether to refuse.

    Args:
        context: The run.
        questions: Requests; `metadata["side"]` says which side they are on, harmless where it is not there.

    Returns:
        A pair each, of the recipe's opening and the answer up to its last whole sentence, and a short refusal; the
        answer is chosen on the harmless side, the refusal on the harmful one.
    """
    if not questions:
        return []
    from resafe.recipe.context import read_json

    def work(path: Path) -> dict[str, Any]:
        prompts = [question.prompt for question in questions]
        answers = generate(
            context.plain(), context.tokenizer, prompts, system=context.system, max_new_tokens=MAX_NEW_TOKENS,
            batch_size=context.recipe.questions.batch_size,
        )  # fmt: skip
        write_json(path / "answers.json", [whole_sentences(answer) for answer in answers])
        return {"questions": len(prompts)}

    depends = {
        "model": context.base.digest,
        "system": context.system,
        "questions": digest_value([question.prompt for question in questions]),
        "max_new_tokens": MAX_NEW_TOKENS,
        "dtype": context.dtype,
    }
    stage = context.run.stage("own-answers", depends, work)
    opening = context.recipe.data.helpful_opening
    pairs = zip(questions, read_json(stage.path / "answers.json"), strict=True)
    return [_pair(question, opening + answer) for question, answer in pairs if answer]


def _pair(question: Question, answer: str) -> Pair:
    refusal = short_refusal(question.id)
    if question.metadata.get("side") == "harmful":
        return Pair(question.id, question.prompt, refusal, answer, "safety")
    return Pair(question.id, question.prompt, answer, refusal, "harmless")


def whole_sentences(text: str) -> str:
    """A text that was cut off, up to the end of its last whole sentence or line; as it is, if it has none."""
    found = re.match(r".*[.!?。।:](?=\s|$)|.*(?=\n)", text.strip(), flags=re.DOTALL)
    return found[0].strip() if found and found[0].strip() else text.strip()
