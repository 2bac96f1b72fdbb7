"""The public instruction and preference sets to train on, besides those in `public`. Holds none of their text.

Sets without a file are on the Hub only.
"""

from __future__ import annotations

from resafe.data.formats import RowError, example_of, pair_of
from resafe.data.items import Example, Pair
from resafe.data.pairs import content_id, preference_pair
from resafe.data.registry import Parser, datasets
from resafe.data.sources import Row

XNLI_HELD_OUT = 600
"""Rows of XNLI's Hindi development set, from the first, that `xnli_hi_rest` leaves out: they are for evaluation."""


def _add(
    name: str, title: str, kind: str, licence: str, hub: str | None, parse: Parser, file: str = "", split: str = "train"
) -> None:
    datasets.register(name, title=title, kind=kind, licence=licence, file=file, hub=hub, split=split)(parse)


def _alpaca(name: str, title: str, licence: str, hub: str, file: str = "") -> None:
    """Columns instruction, input and output; ids of all these sets begin with "alpaca"."""
    _add(name, title, "examples", licence, hub, lambda row: example_of(row.values, "alpaca"), file)


def _safer_pairs(name: str, title: str, hub: str) -> None:
    """The raw layout of PKU-SafeRLHF."""
    _add(name, title, "pairs", "CC-BY-NC-4.0", hub, preference_pair)


def _published_pair(row: Row, name: str) -> Pair | None:
    """A pair of a published set, which nobody here can mend.

    Left out are its rows that are no pairs: equal or empty answers, dialogues that differ before the last answer, or in
    which nobody takes turns. A row without the two columns still raises.
    """
    try:
        return pair_of(row.values, name)
    except RowError:
        if row.has("chosen") and row.has("rejected"):
            return None
        raise


_alpaca(
    "alpaca_gpt4_zh", "Alpaca-GPT4, Chinese instructions with answers", "CC-BY-NC-4.0", "llamafactory/alpaca_gpt4_zh",
    "alpaca_gpt4_zh/alpaca_gpt4_zh_1000.jsonl",
)  # fmt: skip
_alpaca(
    "alpaca_hindi", "Alpaca-cleaned in Hindi, as the published system uses it", "CC-BY-4.0",
    "iamshnoo/alpaca-cleaned-hindi",
)  # fmt: skip


def _inference(row: Row) -> Example | None:
    """A premise and a hypothesis as an instruction, in Hindi, answered by a sentence; None for the first rows."""
    if int(row.place.rpartition(" ")[2]) <= XNLI_HELD_OUT:
        return None
    premise, hypothesis, label = row.text("premise"), row.text("hypothesis"), row.text("label")
    prompt = f"पहला वाक्य: {premise}\nदूसरा वाक्य: {hypothesis}\nपहला वाक्य सही हो तो क्या दूसरा भी सही है?"
    answers = {
        "entailment": "हाँ, दूसरा वाक्य सही है।",
        "neutral": "शायद, पहले वाक्य से यह पता नहीं चलता।",
        "contradiction": "नहीं, दूसरा वाक्य गलत है।",
    }
    return Example(content_id("xnli_hi_rest", prompt), prompt, answers[label]) if label in answers else None


_add(
    "xnli_hi_rest", f"XNLI in Hindi, rows after the first {XNLI_HELD_OUT} as instructions, for trials without the Hub",
    "examples", "CC-BY-NC-4.0", None, _inference, "xnli_hi/xnli_dev_hi.jsonl",
)  # fmt: skip
_alpaca(
    "alpaca_en", "Stanford Alpaca, 3000 English instructions with answers", "CC-BY-NC-4.0", "tatsu-lab/alpaca",
    "alpaca_en/alpaca_sample3000.jsonl",
)  # fmt: skip
_alpaca(
    "codealpaca", "CodeAlpaca, instructions with code", "CC-BY-NC-4.0", "sahil2801/CodeAlpaca-20k",
    "codealpaca/code_alpaca_2k.jsonl",
)  # fmt: skip
_safer_pairs(
    "pku_saferlhf_30k",
    "PKU-SafeRLHF-30K: pairs of which exactly one response is safe",
    "PKU-Alignment/PKU-SafeRLHF-30K",
)
_safer_pairs(
    "pku_saferlhf_full", "PKU-SafeRLHF, all of it: pairs of which exactly one response is safe",
    "PKU-Alignment/PKU-SafeRLHF",
)  # fmt: skip
_add(
    "hh_rlhf", "HH-RLHF: dialogues with a preferred and another last answer", "pairs", "MIT", "Anthropic/hh-rlhf",
    lambda row: _published_pair(row, "hh"),
)  # fmt: skip
_add(
    "ultrafeedback", "UltraFeedback, binarised: answers rated better and worse", "pairs", "MIT",
    "HuggingFaceH4/ultrafeedback_binarized", lambda row: _published_pair(row, "ultrafeedback"), split="train_prefs",
)  # fmt: skip
