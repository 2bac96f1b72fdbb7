"""The seam of all judges: what is judged, what comes out, and judges by name. Knows no judge in particular.

A judge is called with a batch and answers in the same order; what it could not score comes back as "unscored" with
no score, and is never counted as safe or as harmful. A registered judge is a function whose keyword-only parameters
are its settings and which returns the judge; weights and keys are fetched there or on the first call, never at import.
Other packages add theirs through entry points of the group `resafe.judges`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

from resafe.errors import InputError
from resafe.registry import Method, Registry
from resafe.settings import named_values

Measure = Literal["refusal", "harm", "preference"]
"""What a judge's score of 1 stands for: a refusal, a harmful response, or the first of two preferred."""

REFUSED, PARTIAL, ANSWERED, UNDETERMINED = "refused", "partial", "answered", "undetermined"
HARMFUL, HARMLESS = "harmful", "harmless"
BROKEN = "broken"
WON, TIE, LOST = "won", "tie", "lost"
UNSCORED = "unscored"

BUILT_IN = (
    "resafe.evals.rules",
    "resafe.evals.embedded.judge",
    "resafe.evals.llm.rubric",
    "resafe.evals.llm.pairwise",
    "resafe.evals.guards.judge",
)
"""Modules of this package that register judges, imported when a judge is first asked for by name."""

JUDGES = Registry("judge", "resafe.judges")


@dataclass(frozen=True)
class Judged:
    """One response to judge.

    Attributes:
        id: Unique within the batch.
        prompt: The question; may be empty for judges that read only the response.
        response: The model's answer, without special tokens. It is data: a judge never follows it.
        language: "en", "zh", "hi", … or None where it is not known.
    """

    id: str
    prompt: str
    response: str
    language: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one response.

    Attributes:
        outcome: One of the constants of this module: "refused", "partial", "answered", "undetermined", "harmful",
            "harmless", "broken" (degenerate text), of two responses "won", "tie" or "lost", or "unscored".
        score: Between 0 and 1, towards the judge's measure (1 = refused, or 1 = harmful); None for "unscored" and
            "undetermined".
        detail: Why, in one line: the rule, the category, the model's last line, or what went wrong.
    """

    outcome: str
    score: float | None
    detail: str = ""

    @classmethod
    def unscored(cls, why: str) -> Verdict:
        """The verdict of a judge that could not judge."""
        return cls(UNSCORED, None, why)


class Judge(Protocol):
    """Judges batches; as many verdicts as items, in the same order."""

    def __call__(self, items: Sequence[Judged]) -> list[Verdict]:
        """As many verdicts as items, in their order."""
        ...


def judge_method(
    name: str, *, title: str, source: str, measures: Measure, **traits: Any
) -> Callable[[Callable[..., Judge]], Any]:
    """Decorator: registers a function that returns a judge.

    Args:
        name: The name on the command line and in recipes.
        title: One line for people.
        source: Paper, model card or other origin.
        measures: What its score stands for.
        traits: Further facts, such as `weights="org/name"` or `api=True`.
    """
    return JUDGES.register(name, title=title, source=source, measures=measures, **traits)


def judges() -> list[Method]:
    """All judges that can be named, sorted by name."""
    _load_built_in()
    return list(JUDGES)


def judge_named(name: str) -> Method:
    """The registered judge of that name; its `function` makes one, its `traits["measures"]` says what it measures.

    Raises:
        InputError: There is none; the nearest name is given.
    """
    _load_built_in()
    return JUDGES.get(name)


def make_judge(name: str, **settings: Any) -> Judge:
    """A judge by name, its settings checked against its signature.

    Raises:
        InputError: No judge of that name, or a setting it does not have.
    """
    method = judge_named(name)
    judge: Judge = method.function(**method.check(settings))
    return judge


def judge_all(judge: Judge, items: Sequence[Judged], batch_size: int = 1024) -> list[Verdict]:
    """Judges items in batches.

    Raises:
        InputError: An id occurs twice.
        RuntimeError: The judge lost or invented a verdict.
    """
    if hasattr(judge, "estimate"):
        batch_size = max(1, len(items))  # it paces itself, and holds the whole against its budget before it begins
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise InputError(f"two responses have the id {item.id!r}", "ids must be unique")
        seen.add(item.id)
    verdicts: list[Verdict] = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        found = judge(batch)
        if len(found) != len(batch):
            raise RuntimeError(f"a judge gave {len(found)} verdicts on {len(batch)} responses")
        verdicts += found
    return verdicts


def check_threshold(threshold: float) -> None:
    """Checks the score from which a response is harmful.

    Raises:
        InputError: It is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise InputError(
            f"threshold is {threshold}", "give the score from which a response is harmful, above 0, at most 1"
        )


def settings_for(
    names: Sequence[str], pairs: Sequence[str], max_cost: float | None = None
) -> dict[str, dict[str, Any]]:
    """Judge → its settings.

    Args:
        names: Names of judges.
        pairs: `setting=value`, or `judge.setting=value`, which several judges need.
        max_cost: Money that each judge with a price may spend, where its settings do not say.

    Raises:
        InputError: No judge of that name or two of one name, or a setting that does not say whose it is.
    """
    if len(set(names)) < len(names):
        raise InputError(f"a judge is named twice: {', '.join(names)}", "name each once")
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in named_values(pairs, "a judge's setting", "threshold=0.5").items():
        owner, dot, setting = key.partition(".")
        if dot and owner in settings:
            settings[owner][setting] = value
        elif len(names) == 1:
            settings[names[0]][key] = value
        else:
            raise InputError(f"the setting {key!r} does not say whose it is", f"write {names[0]}.{key}=…")
    for name in names:
        if max_cost is not None and "max_cost" in {parameter.name for parameter in judge_named(name).parameters}:
            settings[name].setdefault("max_cost", max_cost)
    return settings


def _load_built_in() -> None:
    for module in BUILT_IN:
        import_module(module)


__all__ = [
    "ANSWERED",
    "BROKEN",
    "HARMFUL",
    "HARMLESS",
    "JUDGES",
    "LOST",
    "PARTIAL",
    "REFUSED",
    "TIE",
    "UNDETERMINED",
    "UNSCORED",
    "WON",
    "Judge",
    "Judged",
    "Measure",
    "Verdict",
    "check_threshold",
    "judge_all",
    "judge_method",
    "judge_named",
    "judges",
    "make_judge",
    "settings_for",
]
