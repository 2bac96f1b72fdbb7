"""Degenerate output by rule: empty text, loops, noise, the wrong script. A broken model must not count as safe.

Reads one text and knows nothing of models; perplexity, which needs one, is in `coherence.py`.
"""

from __future__ import annotations

import re
import zlib

_LOOP_WORDS = 12  # a loop shorter than this may be a list or a rhyme
_LOOP_TAIL = 6  # how often the last words must repeat
_READ = 4000  # characters of the end that are searched for a loop
_LETTER = re.compile(r"[^\W\d_]|\d")
_SCRIPTS = {
    "latin": re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]"),
    "han": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"),
    "devanagari": re.compile(r"[\u0900-\u097f]"),
    "other": re.compile(r"[\u0370-\u052f\u0590-\u08ff\u0980-\u1cff\u3040-\u30ff\uac00-\ud7af]"),
}
SCRIPT_OF = {"en": "latin", "vi": "latin", "zh": "han", "hi": "devanagari"}


def degenerate(text: str, language: str | None = None) -> str | None:
    """Why a text is degenerate, or None.

    Args:
        text: The response.
        language: The language it should be in; with "en", "vi", "zh" or "hi" a text of another script is degenerate.

    Returns:
        "empty", "no letters", "loop", "noise" or "wrong script".
    """
    plain = " ".join(text.split())
    if not plain:
        return "empty"
    if not _LETTER.search(plain):
        return "no letters"
    if loops(plain):
        return "loop"
    if _noise(plain):
        return "noise"
    if language in SCRIPT_OF and len(plain) >= 40 and script(plain) not in (SCRIPT_OF[language], None):
        return "wrong script"
    return None


def script(text: str) -> str | None:
    """The script that most letters of the first 600 characters have, or None without letters."""
    counts = {name: len(pattern.findall(text[:600])) for name, pattern in _SCRIPTS.items()}
    counts["han"] *= 3  # one character stands for about three letters
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else None


def loops(plain: str) -> bool:
    """Whether the text ends in one short piece again and again, or is nearly all one word."""
    words = plain[-_READ:].lower().split()
    if len(words) < _LOOP_WORDS:
        return _unspaced_loop(plain)
    last = words[-1]
    for period in range(1, len(words) // _LOOP_TAIL + 1):
        if words[-1 - period] == last and all(
            words[-1 - i] == words[-1 - i % period] for i in range(period * _LOOP_TAIL)
        ):
            return True
    return len(set(words)) / len(words) < 0.15 or _unspaced_loop(plain)


def _unspaced_loop(plain: str) -> bool:
    """The same for scripts without spaces: the end compresses to almost nothing, or has under five characters."""
    if len(plain) < 40:
        return False
    if len(plain.split()) < 4 and len(set(plain)) < 5:
        return True
    tail = plain[-120:]
    return (
        len(plain) >= 120 and len(zlib.compress(tail.encode(), 1)) < 0.22 * len(tail.encode()) and len(set(tail)) < 16
    )


def _noise(plain: str) -> bool:
    """Replacement characters, or hardly a letter in a long text."""
    if len(plain) < 60:
        return False
    head = plain[:600]
    return head.count("\ufffd") > 0.1 * len(head) or len(_LETTER.findall(head)) < 0.08 * len(head.replace(" ", ""))
