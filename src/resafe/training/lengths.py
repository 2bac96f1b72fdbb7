"""Rows whose prompt leaves no room for an answer: found and named before training. Knows tokenizers, no models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from resafe.data.chat import before_prompt, render
from resafe.data.intake import IntakeReport
from resafe.data.items import Conversation, Example, Pair, Reply

Item = TypeVar("Item", bound=Example | Pair)


def only_fitting(
    examples: Sequence[Item],
    tokenizer: Any,
    system: str | None,
    max_tokens: int,
    reports: Sequence[IntakeReport],
) -> list[Item]:
    """The items whose prompt is shorter than `max_tokens`; the others are counted as "too long" in their report.

    Args:
        examples: Examples or pairs from all sources, in their order.
        tokenizer: Tokenizer with a chat template.
        system: System turn of examples without one.
        max_tokens: Tokens of the longest sequence that is trained on.
        reports: The sources' reports, each with the places of its items.
    """
    kept: list[Item] = []
    owners = [(report, place) for report in reports for place in report.places]
    for example, (report, place) in zip(examples, owners, strict=True):
        if _rejected(example, tokenizer, system, max_tokens, report, place):
            continue
        kept.append(example)
    return kept


def fitting(
    examples: Iterable[Example], tokenizer: Any, system: str | None, max_tokens: int, report: IntakeReport
) -> Iterator[Example]:
    """As `only_fitting`, on the stream of one source; its report must keep places, and keeps none of them here."""
    for example in examples:
        place = report.places.pop()
        if not _rejected(example, tokenizer, system, max_tokens, report, place):
            yield example


def _rejected(
    example: Example | Pair, tokenizer: Any, system: str | None, max_tokens: int, report: IntakeReport, place: str
) -> bool:
    """Whether the prompt leaves no room for an answer; then the report has it."""
    own, before = before_prompt(example, system)
    text = render(tokenizer, example.prompt, own, before)
    learns_earlier = bool(before) and isinstance(example, Conversation) and not isinstance(example, Reply)
    # A tokenizer over bytes never gives more tokens than bytes: most texts need not be tokenized to know they fit.
    if len(text.encode()) < max_tokens or learns_earlier:
        return False
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokens < max_tokens:
        return False
    report.kept -= 1
    report.reject("too long", place, f"its prompt has {tokens} tokens, and max_tokens is {max_tokens}")
    return True
