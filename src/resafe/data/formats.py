"""A row of a user's training data as an example or a pair: Alpaca, ShareGPT, OpenAI messages, TRL's preferences.

Which format a row is in is read off its columns. Knows no files and no counting; a row that cannot be used raises
`RowError` with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from resafe.data.items import Conversation, DialoguePair, Example, Pair, Turn
from resafe.data.pairs import content_id
from resafe.errors import InputError

REASONS = ("empty", "wrong schema", "unknown role", "too long")

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip


class RowError(InputError):
    """A row that cannot be trained on. `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail, "mend the row, or take it out")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Layout:
    """Where things are in a row, for data that does not use the common names (LLaMA-Factory's columns and tags).

    Attributes:
        columns: Our names (`instruction`, `input`, `output`, `history`, `system`, `messages`, `chosen`, `rejected`)
            and the row's.
        role_key: Key of a turn's role; None tries `role` and `from`.
        content_key: Key of a turn's text; None tries `content` and `value`.
        roles: The row's role names and ours, besides the usual ones.
        exact: Read the named columns and no others, also where one has a common name.
        join: What stands between instruction and input.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    role_key: str | None = None
    content_key: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    exact: bool = False
    join: str = "\n\n"


def example_of(values: Mapping[str, Any], name: str = "data", layout: Layout | None = None) -> Example:
    """An example from a row in Alpaca, ShareGPT or OpenAI messages format, or with `prompt` and `response`.

    Args:
        values: The row's columns.
        name: Prefix of the example's id, which depends on the content only.
        layout: Where things are, if not under the common names.

    Raises:
        RowError: The row is empty, has another schema, or a turn of an unknown role.
    """
    layout = layout or Layout()
    messages = _get(values, layout, "messages", "messages", "conversations", "conversation")
    if messages is not None:
        return _from_turns(_turns(messages, layout), name, _system(values, layout))
    prompt, history, system = _prompt_of(values, layout)
    response = _get(values, layout, "output", "output", "response", "completion", "answer")
    if isinstance(response, list) and prompt == "" and _is_turns(response):
        raise RowError("wrong schema", "a list of turns as the answer, without a prompt")
    return _example(name, prompt, _text(response, "the answer"), history, system)


def pair_of(values: Mapping[str, Any], name: str = "data", layout: Layout | None = None) -> Pair:
    """A preference pair from a row in one of TRL's formats or LLaMA-Factory's ranking formats.

    `chosen` and `rejected` are texts, or lists of turns, or single turns; the prompt is in `prompt`, in `instruction`
    and `input`, in `conversations`, or, where there is none, what the two have in common at their beginning.

    Raises:
        RowError: As `example_of`; also if both answers are equal.
    """
    layout = layout or Layout()
    chosen, rejected = _get(values, layout, "chosen", "chosen"), _get(values, layout, "rejected", "rejected")
    if chosen is None and rejected is None:
        answers = _get(values, layout, "output", "output", "response")
        if not isinstance(answers, list) or len(answers) != 2:
            raise RowError("wrong schema", f"no columns 'chosen' and 'rejected' among: {', '.join(map(str, values))}")
        chosen, rejected = answers
    if chosen is None or rejected is None:
        raise RowError("wrong schema", f"no column '{'chosen' if chosen is None else 'rejected'}'")
    before, system = _before(values, layout, chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str) and before is None:
        return _transcripts(chosen, rejected, name)
    good, bad = _answer_turns(chosen, layout), _answer_turns(rejected, layout)
    if before is None:
        shared = 0
        while shared < min(len(good), len(bad)) and good[shared] == bad[shared]:
            shared += 1
        before, good, bad = good[:shared], good[shared:], bad[shared:]
    elif before and good[: len(before)] == bad[: len(before)] == before:  # the prompt is repeated in the answers
        good, bad = good[len(before) :], bad[len(before) :]
    if len(good) != 1 or len(bad) != 1 or good[0][0] != "assistant" or bad[0][0] != "assistant":
        raise RowError("wrong schema", "chosen and rejected must differ in one assistant turn, the last")
    inner, turns = _split_system(before)
    return _pair(name, turns, good[0][1], bad[0][1], inner if inner is not None else system)


def _get(values: Mapping[str, Any], layout: Layout, ours: str, *usual: str) -> Any:
    if ours in layout.columns:
        return values.get(layout.columns[ours])
    if layout.exact:
        return None
    return next((values[name] for name in usual if values.get(name) is not None), None)


def _text(value: Any, what: str) -> str:
    if value is None:
        raise RowError("wrong schema", f"{what} is missing")
    if isinstance(value, list) and value and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        value = "".join(str(part.get("text", "")) for part in value)  # OpenAI's content parts
    if not isinstance(value, str):
        raise RowError("wrong schema", f"{what} is {type(value).__name__}, not text")
    if not value.strip():
        raise RowError("empty", f"{what} is empty")
    return value.strip()


def _system(values: Mapping[str, Any], layout: Layout) -> str | None:
    given = _get(values, layout, "system", "system")
    return given.strip() if isinstance(given, str) and given.strip() else None


def _prompt_of(values: Mapping[str, Any], layout: Layout) -> tuple[str, tuple[Turn, ...], str | None]:
    instruction = _get(values, layout, "instruction", "instruction", "prompt", "question")
    query = _get(values, layout, "input", "input")
    parts = [part.strip() for part in (instruction, query) if isinstance(part, str) and part.strip()]
    if instruction is None and not parts:
        raise RowError("wrong schema", f"no prompt among the columns: {', '.join(map(str, values))}")
    if instruction is not None and not isinstance(instruction, str):
        raise RowError("wrong schema", f"the prompt is {type(instruction).__name__}, not text")
    if not parts:
        raise RowError("empty", "the prompt is empty")
    history: list[Turn] = []
    for turn in _get(values, layout, "history", "history") or ():
        if not isinstance(turn, Sequence) or len(turn) != 2:
            raise RowError("wrong schema", "'history' must hold pairs of prompt and answer")
        history += [("user", _text(turn[0], "a turn")), ("assistant", _text(turn[1], "a turn"))]
    return layout.join.join(parts), tuple(history), _system(values, layout)


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _turns(value: Any, layout: Layout) -> list[Turn]:
    if not isinstance(value, list):
        raise RowError("wrong schema", f"the turns are {type(value).__name__}, not a list")
    if not value:
        raise RowError("empty", "there are no turns")
    return [_turn(item, layout) for item in value]


def _turn(item: Any, layout: Layout) -> Turn:
    if not isinstance(item, Mapping):
        raise RowError("wrong schema", "a turn must be an object with a role and a text")
    role = item.get(layout.role_key) if layout.role_key else item.get("role", item.get("from"))
    known = layout.roles.get(str(role)) or _ROLES.get(str(role).lower())
    if known is None:
        raise RowError("unknown role" if role is not None else "wrong schema", f"a turn has the role {role!r}")
    content = item.get(layout.content_key) if layout.content_key else item.get("content", item.get("value"))
    return known, _text(content, f"a turn of the {known}")


def _split_system(turns: Sequence[Turn]) -> tuple[str | None, list[Turn]]:
    if turns and turns[0][0] == "system":
        return turns[0][1], list(turns[1:])
    return None, list(turns)


def _check_alternation(turns: Sequence[Turn]) -> None:
    for place, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[place % 2]:
            raise RowError("wrong schema", f"turn {place + 1} is of the {role}: user and assistant must take turns")


def _from_turns(turns: Sequence[Turn], name: str, system: str | None) -> Example:
    inner, rest = _split_system(turns)
    _check_alternation(rest)
    if len(rest) % 2:  # a last user turn that nobody answers
        rest = rest[:-1]
    if not rest:
        raise RowError("empty", "there is no answer of the assistant")
    return _example(name, rest[-2][1], rest[-1][1], tuple(rest[:-2]), inner if inner is not None else system)


def _example(name: str, prompt: str, response: str, history: tuple[Turn, ...], system: str | None) -> Example:
    said = [text for turn in history for text in turn]
    key = content_id(name, *([system] if system else []), *said, prompt, response)
    if not history and system is None:
        return Example(key, prompt, response)
    return Conversation(key, prompt, response, history, system)


def _before(
    values: Mapping[str, Any], layout: Layout, chosen: Any, rejected: Any
) -> tuple[list[Turn] | None, str | None]:
    """The turns before the answers, None if they are to be found in the answers themselves; and a system column."""
    whole = _is_turns(chosen) and _is_turns(rejected) and len(chosen) > 1
    if whole and "messages" not in layout.columns:  # UltraFeedback's `messages` hold the chosen answer once more
        return None, _system(values, layout)
    messages = _get(values, layout, "messages", "messages", "conversations")
    if messages is not None:
        return _turns(messages, layout), _system(values, layout)
    prompt = _get(values, layout, "instruction", "prompt", "instruction")
    if isinstance(prompt, list):
        return _turns(prompt, layout), _system(values, layout)
    if prompt is None:
        return None, _system(values, layout)
    text, history, system = _prompt_of(values, layout)
    return [*history, ("user", text)], system


def _answer_turns(value: Any, layout: Layout) -> list[Turn]:
    if isinstance(value, str):
        return [("assistant", _text(value, "an answer"))]
    return [_turn(value, layout)] if isinstance(value, Mapping) else _turns(value, layout)


def _transcripts(chosen: str, rejected: str, name: str) -> Pair:
    """Two texts without a prompt column: HH-RLHF's transcripts, or a common beginning as in TRL."""
    if "\n\nHuman:" in chosen and "\n\nAssistant:" in chosen:
        good, bad = _transcript(chosen), _transcript(rejected)
        if good[:-1] != bad[:-1]:
            raise RowError("wrong schema", "the two transcripts differ before their last answer")
        return _pair(name, good[:-1], good[-1][1], bad[-1][1], None)
    cut = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False)))
    while cut and not chosen[cut - 1].isspace():  # not inside a word
        cut -= 1
    prompt = _text(chosen[:cut], "the common beginning (there is no prompt column, and it)")
    return _pair(name, [("user", prompt)], _text(chosen[cut:], "an answer"), _text(rejected[cut:], "an answer"), None)


def _transcript(text: str) -> list[Turn]:
    turns: list[Turn] = []
    for piece in text.split("\n\nHuman:"):
        asked, *answers = piece.split("\n\nAssistant:")
        if not piece.strip():
            continue
        if len(answers) != 1:
            raise RowError("wrong schema", "a transcript in which Human and Assistant do not take turns")
        turns += [("user", _text(asked, "a turn")), ("assistant", _text(answers[0], "a turn"))]
    if not turns:
        raise RowError("empty", "a transcript without turns")
    return turns


def _pair(name: str, before: Sequence[Turn], chosen: str, rejected: str, system: str | None) -> Pair:
    _check_alternation(before)
    if not before or before[-1][0] != "user":
        raise RowError("wrong schema", "the turns before the answers must end with the user's")
    if chosen == rejected:
        raise RowError("wrong schema", "chosen and rejected are the same")
    history, prompt = tuple(before[:-1]), before[-1][1]
    said = [text for turn in history for text in turn]
    key = content_id(name, *([system] if system else []), *said, prompt, chosen, rejected)
    if not history and system is None:
        return Pair(key, prompt, chosen, rejected, "safety")
    return DialoguePair(key, prompt, chosen, rejected, "safety", history, system)
