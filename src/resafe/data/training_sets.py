"""The public instruction and preference sets to train on, besides those in `public`. Holds none of their text."""

from __future__ import annotations

from resafe.data.formats import example_of, pair_of
from resafe.data.items import Example, Pair
from resafe.data.pairs import preference_pair
from resafe.data.registry import datasets
from resafe.data.sources import Row


def _alpaca(row: Row) -> Example:
    return example_of(row.values, "alpaca")


@datasets.register(
    "alpaca_gpt4_zh",
    title="Alpaca-GPT4, Chinese instructions with answers",
    kind="examples",
    licence="CC-BY-NC-4.0",
    file="alpaca_gpt4_zh/alpaca_gpt4_zh_1000.jsonl",
    hub="llamafactory/alpaca_gpt4_zh",
)
def alpaca_gpt4_zh(row: Row) -> Example:
    """Alpaca columns."""
    return _alpaca(row)


@datasets.register(
    "alpaca_hindi",
    title="Alpaca-cleaned in Hindi, as the published system uses it",
    kind="examples",
    licence="CC-BY-4.0",
    file="",
    hub="iamshnoo/alpaca-cleaned-hindi",
)
def alpaca_hindi(row: Row) -> Example:
    """Alpaca columns; on the Hub only."""
    return _alpaca(row)


@datasets.register(
    "alpaca_en",
    title="Stanford Alpaca, 3000 English instructions with answers",
    kind="examples",
    licence="CC-BY-NC-4.0",
    file="alpaca_en/alpaca_sample3000.jsonl",
    hub="tatsu-lab/alpaca",
)
def alpaca_en(row: Row) -> Example:
    """Alpaca columns."""
    return _alpaca(row)


@datasets.register(
    "codealpaca",
    title="CodeAlpaca, instructions with code",
    kind="examples",
    licence="CC-BY-NC-4.0",
    file="codealpaca/code_alpaca_2k.jsonl",
    hub="sahil2801/CodeAlpaca-20k",
)
def codealpaca(row: Row) -> Example:
    """Alpaca columns."""
    return _alpaca(row)


@datasets.register(
    "pku_saferlhf_30k",
    title="PKU-SafeRLHF-30K: pairs of which exactly one response is safe",
    kind="pairs",
    licence="CC-BY-NC-4.0",
    file="",
    hub="PKU-Alignment/PKU-SafeRLHF-30K",
)
def pku_saferlhf_30k(row: Row) -> Pair | None:
    """The raw layout; on the Hub only."""
    return preference_pair(row)


@datasets.register(
    "pku_saferlhf_full",
    title="PKU-SafeRLHF, all of it: pairs of which exactly one response is safe",
    kind="pairs",
    licence="CC-BY-NC-4.0",
    file="",
    hub="PKU-Alignment/PKU-SafeRLHF",
)
def pku_saferlhf_full(row: Row) -> Pair | None:
    """The raw layout; on the Hub only."""
    return preference_pair(row)


@datasets.register(
    "hh_rlhf",
    title="HH-RLHF: dialogues with a preferred and another last answer",
    kind="pairs",
    licence="MIT",
    file="",
    hub="Anthropic/hh-rlhf",
)
def hh_rlhf(row: Row) -> Pair | None:
    """Transcripts; rows whose two dialogues differ before the last answer raise. On the Hub only."""
    return pair_of(row.values, "hh")


@datasets.register(
    "ultrafeedback",
    title="UltraFeedback, binarised: answers rated better and worse",
    kind="pairs",
    licence="MIT",
    file="",
    hub="HuggingFaceH4/ultrafeedback_binarized",
    split="train_prefs",
)
def ultrafeedback(row: Row) -> Pair | None:
    """Lists of turns. On the Hub only."""
    return pair_of(row.values, "ultrafeedback")
