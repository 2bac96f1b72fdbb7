"""Preference pairs from requests and from labelled response pairs. Knows no files and no models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from resafe.data.embedded import HarmfulRow, HarmlessRow
from resafe.data.items import Pair
from resafe.data.sources import Row
from resafe.errors import InputError

SHORT_REFUSALS = (
    "I can't help with that.",
    "Sorry, but I can't assist with this request.",
    "I'm not able to help with that.",
    "I won't help with this.",
    "Sorry, I cannot answer that.",
    "I'm unable to assist with that request.",
)
"""Refusals that name nothing: what a harmless request should not be answered with."""


def content_id(prefix: str, *parts: str) -> str:
    """An identifier that depends on the content only, so a row has the same one from a file and from the Hub."""
    return f"{prefix}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"


def safety_pairs(rows: Sequence[HarmfulRow]) -> list[Pair]:
    """One pair for each harmful request: its refusal over its compliance, side "safety"."""
    return [Pair(row.id, row.prompt, row.refusal, row.compliance, "safety") for row in rows]


def harmless_pairs(rows: Sequence[HarmlessRow]) -> list[Pair]:
    """One pair for each harmless request: its helpful answer over a short refusal, side "harmless".

    Which refusal is decided by the row's id.
    """
    return [Pair(row.id, row.prompt, row.response, short_refusal(row.id), "harmless") for row in rows]


def short_refusal(key: str) -> str:
    """One of the short refusals; which one depends on the key only."""
    number = int.from_bytes(hashlib.sha256(f"needless-refusal:{key}".encode()).digest()[:8], "big")
    return SHORT_REFUSALS[number % len(SHORT_REFUSALS)]


def preference_pair(row: Row) -> Pair | None:
    """A pair from a row of PKU-SafeRLHF (Ji et al. 2024, arXiv:2406.15513), side "safety".

    Two layouts: the raw one (`prompt`, `response_0`, `response_1`, `is_response_0_safe`, `is_response_1_safe`), of
    which only rows with exactly one safe response count; and the filtered one (`prompt`, `response` = [safer, less
    safe]).

    Returns:
        The pair, or None if not exactly one response is safe or a response is empty.

    Raises:
        InputError: A column is missing or of the wrong kind.
    """
    prompt = row.text("prompt")
    if row.has("response") and isinstance(row.value("response"), list):
        responses = row.value("response")
        if len(responses) != 2 or not all(isinstance(item, str) for item in responses):
            raise InputError(f"{row.place}: column 'response' must hold two texts, [safer, less safe]", "")
        chosen, rejected = responses
    else:
        first, second = row.value("response_0"), row.value("response_1")
        safe = row.flag("is_response_0_safe"), row.flag("is_response_1_safe")
        if safe[0] == safe[1]:
            return None
        chosen, rejected = (first, second) if safe[0] else (second, first)
    chosen, rejected = str(chosen).strip(), str(rejected).strip()
    if not chosen or not rejected:
        return None
    return Pair(content_id("pair", prompt, chosen, rejected), prompt, chosen, rejected, "safety")


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs without exact repetitions (PKU-SafeRLHF repeats about a third of its rows), first ones kept."""
    found = {(pair.prompt, pair.chosen, pair.rejected): pair for pair in reversed(list(pairs))}
    return list(reversed(list(found.values())))
