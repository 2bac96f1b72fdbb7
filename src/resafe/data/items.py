"""The rows that data sets are made of. Knows nothing of files, models or tokens."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """One single-turn instruction example.

    Attributes:
        id: Stable identifier, unique within its set.
        prompt: The user's turn.
        response: The assistant's turn to be learnt.
    """

    id: str
    prompt: str
    response: str


Turn = tuple[str, str]
"""Role ("user" or "assistant") and text."""


@dataclass(frozen=True)
class Conversation(Example):
    """An example with turns before its prompt, or a system turn of its own.

    Attributes:
        history: Turns before `prompt`, user and assistant in alternation; their answers are learnt too.
        system: System turn; None leaves it to the training run.
    """

    history: tuple[Turn, ...] = ()
    system: str | None = None


@dataclass(frozen=True)
class Reply(Conversation):
    """A conversation of which only the last answer is learnt: in a preference pair it alone was judged."""


@dataclass(frozen=True)
class Pair:
    """A preference pair: two responses to one prompt, of which `chosen` is the one to prefer.

    `side` is `safety` (the prompt is harmful, the chosen response refuses), or `harmless` (the chosen
    response helps), so that losses and mixes can weigh the two sides apart.
    """

    id: str
    prompt: str
    chosen: str
    rejected: str
    side: str = "safety"


@dataclass(frozen=True)
class DialoguePair(Pair):
    """A pair whose prompt has turns before it, or a system turn; the responses differ in the last turn only."""

    history: tuple[Turn, ...] = ()
    system: str | None = None


@dataclass(frozen=True)
class Question:
    """A prompt that is only ever evaluated on.

    `target` is the exact answer where the task has one; `topic` groups questions in per-topic tables.
    """

    id: str
    prompt: str
    topic: str = ""
    target: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
