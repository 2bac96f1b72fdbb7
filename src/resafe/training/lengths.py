"""Rows whose prompt leaves no room for an answer: found and named before training. Knows tokenizers, no models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resafe.data.chat import render
from resafe.data.intake import IntakeReport
from resafe.data.items import Conversation, Example


def only_fitting(
    examples: Sequence[Example],
    tokenizer: Any,
    system: str | None,
    max_tokens: int,
    reports: Sequence[IntakeReport],
) -> list[Example]:
    """The examples whose prompt is shorter than `max_tokens`; the others are counted as "too long" in their report.

    Args:
        examples: From all sources, in their order.
        tokenizer: Tokenizer with a chat template.
        system: System turn of examples without one.
        max_tokens: Tokens of the longest sequence that is trained on.
        reports: The sources' reports, each with the places of its items.
    """
    kept: list[Example] = []
    owners = [(report, place) for report in reports for place in report.places]
    for example, (report, place) in zip(examples, owners, strict=True):
        text = render(tokenizer, example.prompt, _system(example, system), _history(example))
        # A tokenizer over bytes never gives more tokens than bytes: most texts need not be tokenized to know they fit.
        if len(text.encode()) >= max_tokens:
            tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            if tokens >= max_tokens and not _history(example):
                report.kept -= 1
                report.reject("too long", place, f"its prompt has {tokens} tokens, and max_tokens is {max_tokens}")
                continue
        kept.append(example)
    return kept


def _system(example: Example, system: str | None) -> str | None:
    return example.system if isinstance(example, Conversation) and example.system is not None else system


def _history(example: Example) -> tuple[tuple[str, str], ...]:
    return example.history if isinstance(example, Conversation) else ()
